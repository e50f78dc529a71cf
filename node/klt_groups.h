// Which layers conditional transform coding takes together (docs/klt.md, "Groups").
#pragma once

#include <vector>

#include "node/config.h"

namespace kvant::node {

// Floats of a group's layers together at most, unless one layer has more, where nothing else is
// said. Narrower groups are coded sooner (docs/klt.md, "Wide or narrow groups").
inline constexpr int kKltGroupWidth = 3072;
// As much as may be asked for.
inline constexpr int kKltMostGroupWidth = 1 << 16;

// Layers that go through one transform and travel as one extent.
struct KltGroup {
  std::vector<int> layers;  // ascending
  bool global = false;      // its layers attend every token; else all of them slide
  // Groups before it, whose strongest coefficients help to predict it: the one before it, and the
  // last one of global layers. Those of global layers have no sliding ones among them.
  std::vector<int> sources;
};

// Floats that a layer keeps of a token.
int StateWidth(const ModelConfig& config);

// The groups of a model's layers from `first` on in the order of their coding: those of global
// layers first, for they are all that is fetched of a block that is out of every window
// (docs/adr/0016). A pure function of the model's geometry and the pack's width: writer and reader
// have the same.
std::vector<KltGroup> KltGroups(const ModelConfig& config, int first, int group_width);

}  // namespace kvant::node
