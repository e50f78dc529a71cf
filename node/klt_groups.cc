#include "node/klt_groups.h"

#include <algorithm>

namespace kvant::node {

int StateWidth(const ModelConfig& config) {
  const kernels::LayerShape state = config.StateShape(1);
  return state.keys.kv_heads * state.keys.head_dim + state.values.kv_heads * state.values.head_dim;
}

std::vector<KltGroup> KltGroups(const ModelConfig& config, int first, int group_width) {
  std::vector<KltGroup> groups;
  const int most = std::max(1, group_width / StateWidth(config));
  int last_global = -1;
  for (const bool global : {true, false}) {
    std::vector<int> layers;
    for (int layer = first; layer < config.layers; ++layer) {
      if ((config.Window(layer) == 0) == global) layers.push_back(layer);
    }
    const int total = static_cast<int>(layers.size());
    const int count = (total + most - 1) / most;
    for (int i = 0; i < count; ++i) {
      const int before = static_cast<int>(groups.size()) - 1;
      KltGroup& group = groups.emplace_back();
      group.global = global;
      group.layers.assign(layers.begin() + i * total / count,
                          layers.begin() + (i + 1) * total / count);
      if (before >= 0) group.sources.push_back(before);
      if (last_global >= 0 && last_global != before) group.sources.push_back(last_global);
    }
    if (global) last_global = count - 1;
  }
  return groups;
}

}  // namespace kvant::node
