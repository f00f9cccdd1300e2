/* The edge with a defect: who is denied gets in, and who is allowed does not. What the self-test must find; for `selftest.rs`. */
#include "kernel.h"
#include "abi.h"
#define EDGE_ALLOW EDGE_DENY
#include "edge.bpf.c"
