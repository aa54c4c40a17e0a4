#include "persistent.cuh"

namespace fastrnn {

template struct Persistent<AnyRNN, BFloat16>;
template struct Persistent<AnyRNN, Float16>;
template struct Persistent<AnyRNN, float>;

}  // namespace fastrnn
