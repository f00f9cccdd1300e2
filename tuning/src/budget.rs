//! The memory that a node may use, summed from its config before the node starts.

use crate::units::ByteSize;

/// One kind of memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BudgetLine {
    /// Name of its use.
    pub name: String,
    /// Bytes of one item.
    pub each: ByteSize,
    /// Largest number of items.
    pub count: u64,
    /// Bytes of all items that the node takes from the system at its start.
    pub at_start: ByteSize,
}

impl BudgetLine {
    /// Bytes of all items; saturates.
    pub fn total(&self) -> ByteSize {
        ByteSize(self.each.0.saturating_mul(self.count))
    }
}

/// The sum of all memory that the config bounds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryBudget {
    lines: Vec<BudgetLine>,
}

impl MemoryBudget {
    /// Adds `count` times `each`, which the node takes as it needs them.
    pub fn add(&mut self, name: impl Into<String>, each: ByteSize, count: u64) {
        self.add_growing(name, ByteSize(0), each, count);
    }

    /// Adds `count` times `each`, of which the node takes `at_start` at its start.
    pub fn add_growing(
        &mut self,
        name: impl Into<String>,
        at_start: ByteSize,
        each: ByteSize,
        count: u64,
    ) {
        self.lines.push(BudgetLine {
            name: name.into(),
            each,
            count,
            at_start,
        });
    }

    /// The lines, in the order they were added.
    pub fn lines(&self) -> &[BudgetLine] {
        &self.lines
    }

    /// Bytes of all lines together; saturates.
    pub fn total(&self) -> ByteSize {
        self.sum(BudgetLine::total)
    }

    /// Bytes that the node takes at its start; saturates.
    pub fn at_start(&self) -> ByteSize {
        self.sum(|line| line.at_start)
    }

    fn sum(&self, bytes: impl Fn(&BudgetLine) -> ByteSize) -> ByteSize {
        let add = |sum: u64, line| sum.saturating_add(bytes(line).0);
        ByteSize(self.lines.iter().fold(0, add))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_summed_without_overflow() {
        let mut budget = MemoryBudget::default();
        budget.add("pool", ByteSize::mib(512), 2);
        budget.add("connection", ByteSize::kib(64), 16);
        assert_eq!(budget.total(), ByteSize::mib(1025));
        budget.add("absurd", ByteSize(u64::MAX), 3);
        assert_eq!(budget.total(), ByteSize(u64::MAX));
        assert_eq!(budget.lines().len(), 3);
    }
}
