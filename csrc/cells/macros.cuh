// Lets one header serve g++ and nvcc, without a CUDA include.
#pragma once

#ifdef __CUDACC__
#define FASTRNN_HD __host__ __device__ __forceinline__
#else
// always_inline: a row loop compiled for AVX2 or AVX-512 needs the equations compiled for the same.
#define FASTRNN_HD inline __attribute__((always_inline))
#endif
