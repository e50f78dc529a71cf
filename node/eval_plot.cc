#include "node/eval_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <string_view>
#include <vector>

#include "kernels/raw_codec.h"

namespace kvant::node {
namespace {

constexpr double kWidth = 860;
constexpr double kHeight = 520;
// The plane of the axes.
constexpr double kLeft = 78;
constexpr double kRight = kWidth - 28;
constexpr double kTop = 58;
constexpr double kBottom = kHeight - 92;
constexpr double kCharacterWidth = 6.6;  // of the 12 px labels, on the wide side
constexpr double kLineHeight = 14;
constexpr double kFewestBits = 1.0 / 64;  // what takes less is drawn here

constexpr std::string_view kColors[] = {"#1b6ca8", "#c4501b", "#2e8b57", "#8e44ad",
                                        "#7a6a00", "#b0305c", "#00808a", "#5a5a5a",
                                        "#a05a2c", "#3f51b5", "#558b2f", "#d0661f"};

struct Point {
  size_t codec = 0;  // index into the codecs shown
  std::string label;
  double bits = 0;
  Estimate kl;
  bool in_class = false;
};

struct Box {
  double x = 0;
  double y = 0;
  double width = 0;
  double height = 0;
  bool Meets(const Box& other) const {
    return x < other.x + other.width && other.x < x + width && y < other.y + other.height &&
           other.y < y + height;
  }
};

std::string Escape(std::string_view text) {
  std::string escaped;
  for (const char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped += c;
    }
  }
  return escaped;
}

std::string Text(double x, double y, std::string_view anchor, std::string_view text,
                 std::string_view more = "") {
  return fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\"{}{}>{}</text>\n", x, y,
                     anchor, more.empty() ? "" : " ", more, Escape(text));
}

std::string Line(double x1, double y1, double x2, double y2, std::string_view style) {
  return fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" {}/>\n", x1, y1,
                     x2, y2, style);
}

// Draws one summary. Lives for one call of EvalPlot.
class Plot {
 public:
  explicit Plot(const EvalSummary& summary) : summary_(summary) {
    Collect();
    ChooseAxes();
  }

  std::string Draw() {
    out_ = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" "
        "viewBox=\"0 0 {0:.0f} {1:.0f}\" font-family=\"Helvetica, Arial, sans-serif\" "
        "font-size=\"12\" fill=\"#222\">\n"
        "<rect width=\"{0:.0f}\" height=\"{1:.0f}\" fill=\"#fff\"/>\n",
        kWidth, kHeight);
    const EvalSetup& setup = summary_.setup;
    out_ += Text(kLeft, 24, "start", fmt::format("What fewer bits cost: {}", setup.model),
                 "font-size=\"16\" font-weight=\"bold\"");
    out_ += Text(kLeft, 43, "start",
                 fmt::format("KL(exact || lossy) of a suffix of {} tokens behind a prefix of {}, "
                             "mean and 95 % interval of {} windows",
                             setup.suffix, setup.prefix, setup.windows),
                 "fill=\"#555\"");
    DrawAxes();
    DrawFloor();
    for (size_t codec = 0; codec < codecs_.size(); ++codec) {
      DrawCurve(codec, false);
      DrawCurve(codec, true);
    }
    DrawLabels();
    DrawLegend();
    return out_ + "</svg>\n";
  }

 private:
  void Collect() {
    for (const SettingSummary& setting : summary_.all.settings) {
      if (setting.codec == kernels::kRawFp32Codec.name) {
        floor_ = setting.read.mean_kl.value;
        continue;
      }
      const std::string label = setting.codec + " " + WireName(setting);
      if (setting.read.mean_kl.value <= 0) {
        without_loss_.push_back(fmt::format("{} ({:.1f} bits)", label, setting.bits_per_element));
        continue;
      }
      const auto known = std::find(codecs_.begin(), codecs_.end(), setting.codec);
      const auto codec = static_cast<size_t>(known - codecs_.begin());
      if (known == codecs_.end()) codecs_.push_back(setting.codec);
      points_.push_back({codec, label, setting.bits_per_element, setting.read.mean_kl, false});
      if (setting.in_class.has_value() && setting.in_class->mean_kl.value > 0) {
        points_.push_back(
            {codec, label, setting.bits_per_element, setting.in_class->mean_kl, true});
      }
    }
  }

  void ChooseAxes() {
    double low = floor_ > 0 ? floor_ : 1;
    double high = floor_ > 0 ? floor_ : 0;
    double fewest = 2;
    double most = 4;
    for (const Point& point : points_) {
      low = std::min(low, point.kl.low > 0 ? point.kl.low : point.kl.value);
      high = std::max(high, point.kl.high);
      fewest = std::min(fewest, point.bits);
      most = std::max(most, point.bits);
    }
    if (high <= 0) low = 1e-6, high = 1;  // nothing to show: any axis will do
    low_decade_ = static_cast<int>(std::floor(std::log10(low)));
    high_decade_ = std::max(static_cast<int>(std::ceil(std::log10(high))), low_decade_ + 1);
    low_octave_ = static_cast<int>(std::floor(std::log2(std::max(fewest, kFewestBits))));
    high_octave_ = static_cast<int>(std::ceil(std::log2(most)));
  }

  double X(double bits) const {
    return kLeft + (kRight - kLeft) * (std::log2(std::max(bits, kFewestBits)) - low_octave_) /
                       (high_octave_ - low_octave_);
  }
  double Y(double kl) const {
    const double decade =
        std::clamp(std::log10(std::max(kl, 1e-300)), static_cast<double>(low_decade_),
                   static_cast<double>(high_decade_));
    return kBottom - (kBottom - kTop) * (decade - low_decade_) / (high_decade_ - low_decade_);
  }

  void DrawAxes() {
    for (int decade = low_decade_; decade <= high_decade_; ++decade) {
      const double y = Y(std::pow(10.0, decade));
      out_ += Line(kLeft, y, kRight, y, "stroke=\"#ddd\"");
      out_ += Text(kLeft - 8, y + 4, "end", fmt::format("1e{}", decade));
    }
    for (int octave = low_octave_; octave <= high_octave_; ++octave) {
      const double bits = std::exp2(octave);
      out_ += Line(X(bits), kTop, X(bits), kBottom, "stroke=\"#eee\"");
      out_ += Text(X(bits), kBottom + 18, "middle", fmt::format("{}", bits));
    }
    out_ += Line(kLeft, kBottom, kRight, kBottom, "stroke=\"#222\"");
    out_ += Line(kLeft, kTop, kLeft, kBottom, "stroke=\"#222\"");
    out_ += Text((kLeft + kRight) / 2, kBottom + 38, "middle",
                 "bits per element, with scales, manifests and keys (bf16: 16)");
    out_ += Text(20, (kTop + kBottom) / 2, "middle", "mean KL, nats a position",
                 fmt::format("transform=\"rotate(-90 20 {:.1f})\"", (kTop + kBottom) / 2));
    if (!without_loss_.empty()) {
      std::string names;
      for (const std::string& name : without_loss_) names += (names.empty() ? "" : ", ") + name;
      out_ += Text(kLeft, kHeight - 14, "start", "KL 0: " + names, "fill=\"#555\"");
    }
  }

  void DrawFloor() {
    if (floor_ <= 0) return;
    out_ += Line(kLeft, Y(floor_), kRight, Y(floor_), "stroke=\"#888\" stroke-dasharray=\"6 4\"");
    const std::string text = fmt::format("noise floor: fp32 against bf16, {}", FormatKl(floor_));
    const Box box{kLeft + 6, Y(floor_) - 5 - kLineHeight,
                  kCharacterWidth * static_cast<double>(text.size()), kLineHeight};
    taken_.push_back(box);
    out_ += Text(box.x, Y(floor_) - 5, "start", text, "fill=\"#666\"");
  }

  // The points of one codec in one form, joined from few bits to many.
  void DrawCurve(size_t codec, bool in_class) {
    std::vector<const Point*> curve;
    for (const Point& point : points_) {
      if (point.codec == codec && point.in_class == in_class) curve.push_back(&point);
    }
    std::stable_sort(curve.begin(), curve.end(),
                     [](const Point* a, const Point* b) { return a->bits < b->bits; });
    const std::string_view color = kColors[codec % std::size(kColors)];
    for (size_t i = 1; i < curve.size(); ++i) {
      out_ += Line(X(curve[i - 1]->bits), Y(curve[i - 1]->kl.value), X(curve[i]->bits),
                   Y(curve[i]->kl.value),
                   fmt::format("stroke=\"{}\" stroke-opacity=\"0.5\"{}", color,
                               in_class ? " stroke-dasharray=\"3 3\"" : ""));
    }
    for (const Point* point : curve) {
      // Side by side, so that both intervals can be seen.
      const double x = X(point->bits) + (in_class ? 5 : 0);
      const double y = Y(point->kl.value);
      if (point->kl.known) {
        const std::string style = fmt::format("stroke=\"{}\" stroke-width=\"1.5\"", color);
        out_ += Line(x, Y(point->kl.low), x, Y(point->kl.high), style);
        for (const double end : {point->kl.low, point->kl.high}) {
          out_ += Line(x - 3, Y(end), x + 3, Y(end), style);
        }
      }
      out_ += fmt::format(
          "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4.5\" fill=\"{}\" stroke=\"{}\" "
          "stroke-width=\"1.5\"/>\n",
          x, y, in_class ? "#fff" : color, color);
      taken_.push_back({x - 6, y - 6, 12, 12});
    }
  }

  // A name at each point that was read, where it meets nothing else.
  void DrawLabels() {
    for (const Point& point : points_) {
      if (point.in_class) continue;
      const double x = X(point.bits);
      const double y = Y(point.kl.value);
      const double width = kCharacterWidth * static_cast<double>(point.label.size());
      const Box places[] = {
          {x + 14, y - 8, width, kLineHeight},         {x - 10 - width, y - 8, width, kLineHeight},
          {x + 8, y - 24, width, kLineHeight},         {x + 8, y + 9, width, kLineHeight},
          {x - 6 - width, y - 24, width, kLineHeight}, {x - 6 - width, y + 9, width, kLineHeight}};
      const auto fits = [&](const Box& box) {
        return box.x >= kLeft && box.x + box.width <= kRight && box.y >= kTop &&
               box.y + box.height <= kBottom &&
               std::none_of(taken_.begin(), taken_.end(),
                            [&](const Box& other) { return box.Meets(other); });
      };
      const auto found = std::find_if(std::begin(places), std::end(places), fits);
      const Box& box = found == std::end(places) ? places[0] : *found;
      taken_.push_back(box);
      out_ += Text(box.x, box.y + kLineHeight - 3, "start", point.label,
                   fmt::format("fill=\"{}\"", kColors[point.codec % std::size(kColors)]));
    }
  }

  void DrawLegend() {
    const double y = kHeight - 36;
    out_ += fmt::format("<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4.5\" fill=\"#444\"/>\n",
                        kLeft + 5, y - 4);
    out_ += Text(kLeft + 16, y, "start", "prefix computed exactly, read lossy");
    out_ += fmt::format(
        "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"4.5\" fill=\"#fff\" stroke=\"#444\" "
        "stroke-width=\"1.5\"/>\n",
        kLeft + 275, y - 4);
    out_ +=
        Text(kLeft + 286, y, "start", "prefix computed over its own encoded form (as Kvant does)");
  }

  const EvalSummary& summary_;
  std::vector<std::string> codecs_;  // that have points
  std::vector<Point> points_;
  std::vector<std::string> without_loss_;
  double floor_ = 0;  // 0: not measured, or nothing to see
  int low_decade_ = 0;
  int high_decade_ = 1;
  int low_octave_ = 1;  // of bits
  int high_octave_ = 2;
  std::vector<Box> taken_;
  std::string out_;
};

}  // namespace

std::string EvalPlot(const EvalSummary& summary) { return Plot(summary).Draw(); }

}  // namespace kvant::node
