// The products, compiled for each type in memory.
#include "long_product.h"

namespace fastrnn {

#define FASTRNN_INSTANCE(S)                                    \
  template void walk_widest(const Pack<S>&, int64_t, int64_t); \
  template void walk_widest(const Multiply<S>&, int64_t, int64_t);
FASTRNN_EACH_STORAGE(FASTRNN_INSTANCE)

template void walk_widest(const RowsOfProduct<float>&, int64_t, int64_t);
template void walk_widest(const RowsOfProduct<double>&, int64_t, int64_t);

}  // namespace fastrnn
