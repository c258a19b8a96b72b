// Does nothing. Where it can be compiled and loaded, so can the others.

extern "C" __global__ void nothing() {}
