/* The edge with a defect: denied sources get in, and allowed ones do not. The self-test must
 * find it; for `selftest.rs`. */
#include "kernel.h"
#include "abi.h"
#define EDGE_ALLOW EDGE_DENY
#include "edge.bpf.c"
