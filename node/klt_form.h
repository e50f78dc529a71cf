// Blocks that stand in the tier as conditional transform coding makes them, and are attended in
// another codec, or refined to exact bf16 (docs/klt.md, "In the tier").
#pragma once

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "node/klt_pack.h"
#include "node/model.h"
#include "node/stored_form.h"

namespace kvant::node {

// Behind other cuts: what they lack of codec `raw`.
inline constexpr std::string_view kExactCut = "exact";

// cuts: names of the pack's, those that a block holds: one, or several that refine each other
// (KltPack::refining), comma-separated. What all of them say is what prefill attends, so they are
// part of the numerics class, as the pack is. With kExactCut behind them, of codec `raw`, that is
// the exact state, and the class is the one of `raw` stored plain. Borrows the model.
// recompute: numbers of first layers, of the pack's transforms, ascending: a block also holds the
// pack's cuts for readers who compute so many themselves. A way to read each (StoredForm::ways).
// kInvalidArgument: cuts that there are not, or that can't be held together (lists those that can);
// layers that the pack is not made for.
Result<StoredFormPtr> MakeKltForm(const Model* model, std::shared_ptr<const KltPack> pack,
                                  std::string_view cuts, std::span<const int> recompute,
                                  const AttendedPayload& attended);

}  // namespace kvant::node
