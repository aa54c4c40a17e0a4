// What lets one header serve g++ and nvcc: no CUDA include, only these two names.
#pragma once

#ifdef __CUDACC__
#define FASTRNN_HD __host__ __device__ __forceinline__
#else
// always_inline, so that a row loop compiled for AVX2 or AVX-512 takes its equations along.
#define FASTRNN_HD inline __attribute__((always_inline))
#endif
