use super::*;

/// A value of a kind, as the parser would produce it.
fn sample(kind: Kind) -> Value {
    match kind {
        Kind::Integer { min, .. } => Value::Integer(min),
        Kind::Bytes { min, .. } => Value::Bytes(min),
        Kind::Duration { min, .. } => Value::Duration(min),
        Kind::Path | Kind::Name | Kind::PublicKey => Value::Text("x".into()),
        Kind::Choice(words) => Value::Word(words[words.len() - 1]),
        Kind::Address => Value::Address(([127, 0, 0, 1], 1).into()),
        Kind::Seeds => Value::Seeds(vec![crate::config::Seed {
            public_key: "ab".repeat(32),
            tls_key: Some("cd".repeat(32)),
            address: "node.example:1".parse().unwrap(),
        }]),
        Kind::Cores => Value::Cores(crate::config::Cores::List(vec![3])),
        Kind::Names | Kind::Nodes => Value::Names(vec!["eth0".into()]),
        Kind::Ports => Value::Ports(vec![443]),
    }
}

fn accepts_its_kind<C: Default>(fields: &[Field<C>]) {
    for field in fields {
        let mut config = C::default();
        assert_eq!(
            (field.set)(&mut config, sample(field.kind)),
            Ok(()),
            "{}",
            field.name
        );
        assert_eq!(
            field.value(&config),
            sample(field.kind),
            "{} is set and read",
            field.name
        );
        assert!(
            !field.doc.is_empty() && field.doc.ends_with('.'),
            "{} is documented",
            field.name
        );
        assert_eq!(
            field.presence == Presence::Default,
            field.example.is_empty(),
            "{}: an example exactly where there is no default",
            field.name
        );
    }
}

fn default_is_in_bounds<C: Default>(fields: &[Field<C>]) {
    for field in fields
        .iter()
        .filter(|field| field.presence == Presence::Default)
    {
        let fits = match (field.kind, field.value(&C::default())) {
            (Kind::Integer { min, max }, Value::Integer(v)) => (min..=max).contains(&v),
            (Kind::Bytes { min, max }, Value::Bytes(v)) => (min..=max).contains(&v),
            (Kind::Duration { min, max }, Value::Duration(v)) => (min..=max).contains(&v),
            (Kind::Choice(words), Value::Word(v)) => words.contains(&v),
            (Kind::Integer { .. } | Kind::Bytes { .. } | Kind::Duration { .. }, _) => false,
            _ => true,
        };
        assert!(fits, "{}", field.name);
    }
}

/// Invariants 2 and 3 over the whole table.
#[test]
fn every_row_takes_its_own_kind_and_has_a_default_in_bounds() {
    for section in sections() {
        accepts_its_kind(section.fields);
        default_is_in_bounds(section.fields);
    }
    accepts_its_kind(core_fields());
    default_is_in_bounds(core_fields());
}

#[test]
fn names_are_unique_within_a_section() {
    for section in sections() {
        let mut names: Vec<_> = section.fields.iter().map(|field| field.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count, "{}", section.name);
    }
}
