#include "persistent.cuh"

namespace fastrnn {

template struct Persistent<LSTM, BFloat16>;
template struct Persistent<LSTM, Float16>;
template struct Persistent<LSTM, float>;

}  // namespace fastrnn
