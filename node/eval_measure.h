// Forward passes of `kvant eval`: a fresh suffix against its prefix in every form that is compared,
// and what each form costs in nats and in right answers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "kernels/thread_pool.h"
#include "node/block_class.h"
#include "node/decoder.h"
#include "node/eval_past.h"
#include "node/eval_text.h"
#include "node/model.h"
#include "node/state_coder.h"

namespace kvant::node {

// What is stored, and how much of it a suffix reads: a codec's blocks at some cuts, or what a coder
// makes of the whole prefix.
struct EvalSetting {
  // The same object for settings of one codec; of a coder: one that keeps fp32 as it is.
  const BlockClass* block_class = nullptr;
  std::string wire;  // name shown
  Cuts read;
  const StateCoder* coder =
      nullptr;            // the same object for its settings; nullptr: the class's codec
  size_t coder_wire = 0;  // index into coder->wires()
  int recomputed_layers = 0;

  std::string_view codec() const {
    return coder != nullptr ? coder->name() : block_class->codec().name;
  }
};

// One window's suffix behind one form of its prefix.
struct SuffixMeasure {
  std::vector<float> kl;  // [suffix]: KL(exact || this form) over the vocabulary, nats
  double agreement = 0;   // share of positions whose most likely token is that of the exact form
  double loss = 0;        // mean nats of the suffix's tokens but its first
  double copy_loss = 0;   // mean nats of the repeated span's tokens behind kCopyUncounted
};

// One way to come by a prefix and to read it.
struct FormMeasures {
  std::vector<SuffixMeasure> windows;  // [window]
  std::vector<double> passkeys;        // [prompt]: 1 right, 0 wrong
};

struct PasskeyPlace {
  int length = 0;
  double depth = 0;
};

struct EvalMeasures {
  FormMeasures exact;              // prefix computed and read in the class raw
  std::vector<FormMeasures> read;  // [setting]: computed so, encoded and read lossy
  // [setting]: computed over its own encoded form; empty as a whole, or without windows for coders
  // that have no such form.
  std::vector<FormMeasures> in_class;
  std::vector<double> zeroed_loss;  // [window]: loss behind keys and values of 0
  // [window]: behind another place's prefix, of windows that have one.
  std::vector<std::optional<double>> stranger_loss;
  std::vector<PasskeyPlace> places;  // [prompt]
  // [setting]: of one block, mean over the first window's prefix; 0 of coders whose blocks are not
  // the tier's.
  std::vector<double> manifest_bytes;
  // [setting][window]: what coders stored of an element of the window's prefix, bits; 0 of codecs,
  // whose layout says it.
  std::vector<std::vector<double>> coded_bits;
};

// Exact logits of some positions, to compare others with. Single-owner.
class ReferenceRows {
 public:
  // logits: [rows][vocab]; borrowed until the next Set. log_sums[rows]: ln(sum(exp(logits))) of
  // each row, as LogSums gives them, here and below.
  void Set(const float* logits, std::span<const double> log_sums, int vocab,
           kernels::ThreadPool* pool);
  // Fills kl[rows] with KL(reference || logits) in nats, agree[rows] with whether the most likely
  // token is the same.
  void Compare(const float* logits, std::span<const double> log_sums, kernels::ThreadPool* pool,
               float* kl, uint8_t* agree) const;

 private:
  int rows_ = 0;
  size_t vocab_ = 0;
  const float* logits_ = nullptr;
  std::vector<float> probabilities_;  // [rows][vocab]
  std::vector<double> log_sums_;      // [rows]
  std::vector<size_t> best_;          // [rows]
};

// ln(sum(exp(x))) of each row of logits[rows][vocab], in double. kDataLoss: not finite.
Result<std::vector<double>> LogSums(const float* logits, int rows, int vocab,
                                    kernels::ThreadPool* pool);

// Single-owner; borrows model, pool and the settings' classes.
class Evaluator {
 public:
  // in_class: measure prefixes computed over their own encoded form too.
  // REQUIRES: kernels::LoadBlas() was ok.
  Evaluator(const Model* model, kernels::ThreadPool* pool, std::vector<EvalSetting> settings,
            bool in_class);

  // REQUIRES: prefix + suffix <= max_positions; the prefix is whole blocks.
  Status AddWindow(const EvalWindow& window);
  // REQUIRES: as many tokens <= max_positions.
  Status AddPasskey(const PasskeyPrompt& prompt);
  const EvalMeasures& measures() const { return measures_; }

 private:
  // A prefix as a suffix finds it.
  struct Lane {
    const EncodedBlocks* prefix = nullptr;
    Cuts read;
  };
  // What is stored of a prefix: a codec's blocks, or what one wire of a coder gives.
  struct Source {
    const BlockClass* block_class = nullptr;
    const StateCoder* coder = nullptr;
    size_t wire = 0;
  };
  // One prefix in every form. Raw's forms are the exact one.
  struct Forms {
    EncodedBlocks exact;
    std::vector<EncodedBlocks> read;           // [source]
    std::vector<EncodedBlocks> in_class;       // [source]
    std::vector<double> coded_bits;            // [source], an element; 0 of codecs
    std::vector<double> coded_manifest_bytes;  // [source], of all blocks; 0 of codecs
  };
  // Sees the logits of a suffix's tokens [at, at + rows) of one lane: [rows][vocab]. Valid until
  // the same lane's next ones for lane 0, for the call otherwise.
  using LogitsVisitor =
      std::function<Status(size_t lane, size_t at, int rows, const float* logits)>;

  // Index into sources_; a coder's are added all at once.
  size_t SourceOf(const EvalSetting& setting);
  bool IsExact(size_t source) const;
  // Whether its prefixes can be computed over their own encoded form, and are not the exact ones.
  bool HasClassForm(size_t source) const;
  Result<Forms> ComputeForms(std::span<const int32_t> prefix);
  // The exact form, then each setting read, then each setting in class that has such a form.
  std::vector<Lane> LanesOf(const Forms& forms) const;
  // The measures that belong to those lanes.
  std::vector<FormMeasures*> MeasuresOfLanes();
  // What was not computed because it is the same by definition.
  template <typename Copy>
  void CopyExactClasses(const Copy& copy);
  // Computes `tokens` behind the prefix of every lane, block by block and in each block lane by
  // lane.
  Status RunSuffix(std::span<const Lane> lanes, std::span<const int32_t> tokens,
                   const LogitsVisitor& visit);
  Status MeasureSuffix(std::span<const Lane> lanes, std::span<const int32_t> suffix,
                       std::vector<SuffixMeasure>* out);
  Status MeasureCopy(std::span<const Lane> lanes, std::span<const int32_t> copy,
                     std::vector<SuffixMeasure>* out);

  const Model& model_;
  kernels::ThreadPool* pool_;
  std::vector<EvalSetting> settings_;
  bool in_class_;
  BlockClass exact_class_;
  BlockClass suffix_class_;
  std::vector<Source> sources_;    // of the settings, each once; a coder's wires in a row
  std::vector<size_t> source_of_;  // [setting]: index into sources_
  Decoder decoder_;
  std::vector<float> exact_logits_;  // [kBlockTokens][vocab]
  std::vector<float> logits_;        // [kBlockTokens][vocab]
  EvalMeasures measures_;
};

}  // namespace kvant::node
