// The products, compiled for each type in memory.
#include "long_product.h"

namespace fastrnn {

#define FASTRNN_INSTANCE(S)                                    \
  template void walk_widest(const Pack<S>&, int64_t, int64_t); \
  template void walk_widest(const Multiply<S>&, int64_t, int64_t);
FASTRNN_EACH_STORAGE(FASTRNN_INSTANCE)

template void walk_widest(const Pack<BFloat16, Pair>&, int64_t, int64_t);
template void walk_widest(const MultiplyPairs<PortablePairs>&, int64_t, int64_t);
#ifdef FASTRNN_AVX512_BF16
template void walk_avx512_bf16(const MultiplyPairs<Avx512Pairs>&, int64_t, int64_t);
#endif

#define FASTRNN_INSTANCE_OF_TILES(In) \
  template void walk_baseline(const MultiplyTiles<PortableTiles, In>&, int64_t, int64_t);
FASTRNN_INSTANCE_OF_TILES(float)
FASTRNN_INSTANCE_OF_TILES(BFloat16)
#ifdef FASTRNN_AMX
template void walk_amx(const MultiplyTiles<AmxTiles, float>&, int64_t, int64_t);
template void walk_amx(const MultiplyTiles<AmxTiles, BFloat16>&, int64_t, int64_t);
#endif

template void walk_widest(const RowsOfProduct<float>&, int64_t, int64_t);
template void walk_widest(const RowsOfProduct<double>&, int64_t, int64_t);

}  // namespace fastrnn
