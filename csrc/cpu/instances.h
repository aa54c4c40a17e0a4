// Templates that several sources use are compiled in one of them: their headers declare the instances
// `extern`.
#pragma once

#include "../common/storage.cuh"

// instance(S) for each type in memory.
#define FASTRNN_EACH_STORAGE(instance) \
  instance(float) instance(double) instance(::fastrnn::BFloat16) instance(::fastrnn::Float16)
