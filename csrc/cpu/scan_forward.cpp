// The scans, compiled for each type in memory.
#include "scan_forward.h"

namespace fastrnn {

#define FASTRNN_INSTANCE(S) template struct ForwardScan<S>;
FASTRNN_EACH_STORAGE(FASTRNN_INSTANCE)

}  // namespace fastrnn
