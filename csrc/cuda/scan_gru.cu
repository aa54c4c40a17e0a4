#include "persistent.cuh"

namespace fastrnn {

template struct Persistent<GRU, BFloat16>;
template struct Persistent<GRU, Float16>;
template struct Persistent<GRU, float>;

}  // namespace fastrnn
