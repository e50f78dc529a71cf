// The rate-distortion picture of `kvant eval`: mean KL against bits per element.
#pragma once

#include <string>

#include "node/eval_report.h"

namespace kvant::node {

// A whole SVG file. Both axes are logarithmic, KL has its 95 % interval; points of one codec are
// joined. The noise floor is a line; what has no KL at all is named below the picture.
std::string EvalPlot(const EvalSummary& summary);

}  // namespace kvant::node
