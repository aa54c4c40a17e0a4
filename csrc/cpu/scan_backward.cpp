// The reverse scans, compiled for each type in memory.
#include "scan_backward.h"

namespace fastrnn {

#define FASTRNN_INSTANCE(S) template struct BackwardScan<S>;
FASTRNN_EACH_STORAGE(FASTRNN_INSTANCE)

}  // namespace fastrnn
