// Reads the source tree and holds it to the rules that no compiler checks: the arrows between the
// folders, that every source file is built and every test registered, sizes, words that promise
// work instead of doing it, links in the documentation, and the format.
//
// Each violation names the file, the line and the remedy.
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace kvant {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxLines = 700;

// What a folder may include besides itself. docs/architecture.md draws the same.
const std::map<std::string, std::set<std::string>, std::less<>> kArrows = {
    {"base", {}},
    {"transport", {"base"}},
    {"kernels", {"base"}},
    {"cluster", {"transport", "base"}},
    {"cache_service", {"cluster", "transport", "base"}},
    {"node", {"kernels", "cache_service", "cluster", "transport", "base"}},
};

struct File {
  std::string path;       // from the root of the tree, with '/'
  std::string folder;     // its first component; "" at the top level
  std::string name;       // without folders
  std::string extension;  // with the dot; "" for scripts
  std::string text;
};

bool IsText(const std::string& extension, const std::string& folder) {
  static const std::set<std::string> kText = {".cc",    ".h",  ".inc", ".py",    ".md",
                                              ".cmake", ".sh", ".txt", ".proto", ".service"};
  if (folder == "models") return extension == ".md";  // the rest is data
  return kText.contains(extension) ||
         (extension.empty() && (folder == "scripts" || folder == ".ci"));
}

std::vector<File> ReadTree() {
  static const std::set<std::string> kNotOurs = {".git", "build", "out", "__pycache__"};
  const fs::path root = KVANT_SOURCE_DIR;
  std::vector<File> files;
  for (auto it = fs::recursive_directory_iterator(root); it != fs::end(it); ++it) {
    const fs::path relative = it->path().lexically_relative(root);
    if (it->is_directory()) {
      if (kNotOurs.contains(relative.filename().string())) it.disable_recursion_pending();
      continue;
    }
    if (!it->is_regular_file()) continue;
    File file;
    file.path = relative.generic_string();
    file.folder = relative.has_parent_path() ? relative.begin()->string() : "";
    file.name = relative.filename().string();
    file.extension = relative.extension().string();
    if (!IsText(file.extension, file.folder)) continue;
    std::ifstream in(it->path(), std::ios::binary);
    file.text.assign(std::istreambuf_iterator<char>(in), {});
    files.push_back(std::move(file));
  }
  std::sort(files.begin(), files.end(),
            [](const File& a, const File& b) { return a.path < b.path; });
  return files;
}

const std::vector<File>& Tree() {
  static const std::vector<File> files = ReadTree();
  return files;
}

bool IsCpp(const File& file) {
  return file.extension == ".cc" || file.extension == ".h" || file.extension == ".inc";
}

bool IsCMake(const File& file) {
  return file.extension == ".cmake" || file.name == "CMakeLists.txt";
}

bool Exists(const fs::path& relative) { return fs::exists(KVANT_SOURCE_DIR / relative); }

bool IsWordCharacter(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// True when `word` stands in `text` with no letter, digit or underscore beside it.
bool HasWord(std::string_view text, std::string_view word) {
  for (size_t at = text.find(word); at != text.npos; at = text.find(word, at + 1)) {
    const size_t end = at + word.size();
    if ((at == 0 || !IsWordCharacter(text[at - 1])) &&
        (end == text.size() || !IsWordCharacter(text[end]))) {
      return true;
    }
  }
  return false;
}

// Calls visit(line, number) for each line, numbers from 1.
template <typename Visit>
void ForEachLine(const std::string& text, Visit visit) {
  std::istringstream in(text);
  std::string line;
  for (size_t number = 1; std::getline(in, line); ++number) visit(line, number);
}

// The path of `#include "path"`, else "".
std::string IncludedPath(const std::string& line) {
  constexpr std::string_view kInclude = "#include \"";
  if (!line.starts_with(kInclude)) return "";
  return line.substr(kInclude.size(), line.find('"', kInclude.size()) - kInclude.size());
}

std::string FirstComponent(const std::string& path) {
  const size_t slash = path.find('/');
  return slash == path.npos ? "" : path.substr(0, slash);
}

// Collects what is wrong; the test fails with all of it at once.
class Violations {
 public:
  ~Violations() { EXPECT_EQ(count_, 0u) << "violations:\n" << text_; }
  template <typename... Args>
  void Add(fmt::format_string<Args...> format, Args&&... args) {
    ++count_;
    text_ += "  " + fmt::format(format, std::forward<Args>(args)...) + "\n";
  }

 private:
  size_t count_ = 0;
  std::string text_;
};

TEST(Tidy, TheTreeIsRead) {
  // Guards every other test here: an empty tree would pass all of them.
  std::set<std::string> folders;
  for (const File& file : Tree()) folders.insert(file.folder);
  for (const auto& [folder, allowed] : kArrows) {
    EXPECT_TRUE(folders.contains(folder)) << "no source file in " << folder << "/: was it renamed?";
  }
}

TEST(Tidy, IncludesFollowTheArrows) {
  Violations violations;
  for (const File& file : Tree()) {
    if (!IsCpp(file)) continue;
    const auto arrows = kArrows.find(file.folder);
    ForEachLine(file.text, [&](const std::string& line, size_t number) {
      const std::string included = IncludedPath(line);
      if (included.empty()) return;
      const std::string folder = FirstComponent(included);
      std::string source = included;
      if (const size_t generated = source.rfind(".pb.h"); generated != source.npos) {
        source.replace(generated, source.npos, ".proto");
      }
      if (!kArrows.contains(folder) && folder != "tests") {
        violations.Add(
            "{}:{}: \"{}\" does not start with a folder of the tree: write it from the root",
            file.path, number, included);
      } else if (!Exists(source)) {
        violations.Add("{}:{}: {} does not exist", file.path, number, source);
      } else if (arrows != kArrows.end() && folder != file.folder &&
                 !arrows->second.contains(folder)) {
        violations.Add(
            "{}:{}: {}/ must not include {}/ (the arrows are in docs/architecture.md): move what "
            "is "
            "shared down, or pass it in as an interface",
            file.path, number, file.folder, folder);
      }
    });
  }
}

TEST(Tidy, LinkLinesFollowTheArrows) {
  Violations violations;
  for (const File& file : Tree()) {
    const auto arrows = kArrows.find(file.folder);
    if (!IsCMake(file) || arrows == kArrows.end()) continue;
    for (const auto& [folder, unused] : kArrows) {
      if (folder != file.folder && !arrows->second.contains(folder) &&
          HasWord(file.text, "kvant_" + folder)) {
        violations.Add("{}: {}/ must not link kvant_{}: remove it from target_link_libraries",
                       file.path, file.folder, folder);
      }
    }
  }
}

TEST(Tidy, EverySourceFileIsBuilt) {
  Violations violations;
  for (const File& file : Tree()) {
    if (file.extension != ".cc" && file.extension != ".proto") continue;
    const std::string stem = file.name.substr(0, file.name.rfind('.'));
    // kvant_fuzz(NAME ...) registers NAME_fuzz.cc.
    const std::string fuzz =
        stem.ends_with("_fuzz") ? "kvant_fuzz(" + stem.substr(0, stem.rfind('_')) + " " : "";
    const bool built = std::any_of(Tree().begin(), Tree().end(), [&](const File& other) {
      return IsCMake(other) && other.folder == file.folder &&
             (HasWord(other.text, stem) ||
              (!fuzz.empty() && other.text.find(fuzz) != other.text.npos));
    });
    if (built) continue;
    if (stem.ends_with("_test")) {
      violations.Add("{}: is not registered: add kvant_test({} ...) to a tests/*.cmake", file.path,
                     stem);
    } else if (!fuzz.empty()) {
      violations.Add("{}: is not registered: add {}...) to tests/fuzz/CMakeLists.txt", file.path,
                     fuzz);
    } else {
      violations.Add("{}: no target builds it: name it in {}/CMakeLists.txt, or delete it",
                     file.path, file.folder);
    }
  }
}

TEST(Tidy, TestsStandInTests) {
  Violations violations;
  for (const File& file : Tree()) {
    if (file.name.ends_with("_test.cc") && file.folder != "tests") {
      violations.Add("{}: tests stand in tests/: move it there", file.path);
    }
  }
}

TEST(Tidy, EachNameStandsOnceInTheTree) {
  Violations violations;
  std::map<std::string, std::string> first;  // name -> path
  for (const File& file : Tree()) {
    if (!IsCpp(file) && file.extension != ".proto") continue;
    const auto [it, fresh] = first.emplace(file.name, file.path);
    if (!fresh) {
      violations.Add("{}: {} has the same name: rename one, so that a name means one file",
                     file.path, it->second);
    }
  }
}

TEST(Tidy, HeadersAreGuardedByPragmaOnce) {
  Violations violations;
  for (const File& file : Tree()) {
    if (file.extension == ".h" && file.text.find("\n#pragma once\n") == file.text.npos) {
      violations.Add("{}: add '#pragma once' after the opening comment", file.path);
    }
  }
}

TEST(Tidy, FilesOpenWithWhatTheyAreFor) {
  Violations violations;
  for (const File& file : Tree()) {
    if (file.extension == ".cc" && Exists(fs::path(file.path).replace_extension(".h"))) {
      continue;  // its header says it
    }
    bool opened = true;
    if (IsCpp(file) || file.extension == ".proto") {
      opened = file.text.starts_with("// ");
    } else if (file.extension == ".py") {
      opened = file.text.starts_with("\"\"\"") || file.text.starts_with("#!");
    } else if (file.folder == "scripts" && file.extension.empty()) {
      opened = file.text.starts_with("#!");
    }
    if (!opened) {
      violations.Add("{}:1: open the file with a comment that says what it is for", file.path);
    }
  }
}

TEST(Tidy, FilesAreShort) {
  Violations violations;
  for (const File& file : Tree()) {
    if (!IsCpp(file) && file.extension != ".py") continue;
    const auto lines = static_cast<size_t>(std::count(file.text.begin(), file.text.end(), '\n'));
    if (lines > kMaxLines) {
      violations.Add("{}: {} lines, the limit is {}: it wants to be two files", file.path, lines,
                     kMaxLines);
    }
  }
}

TEST(Tidy, NothingIsLeftForLater) {
  // Put together here, so that this file passes its own test.
  const std::string kLater[] = {std::string("TO") + "DO", std::string("FIX") + "ME",
                                std::string("XX") + "X", std::string("TB") + "D"};
  const std::string kHollow = std::string("st") + "ub";
  Violations violations;
  for (const File& file : Tree()) {
    ForEachLine(file.text, [&](const std::string& line, size_t number) {
      for (const std::string& word : kLater) {
        if (HasWord(line, word)) {
          violations.Add("{}:{}: '{}': do it now, or open an issue", file.path, number, word);
        }
      }
      if ((IsCpp(file) || file.extension == ".py") && HasWord(line, kHollow)) {
        violations.Add("{}:{}: '{}': build the real thing, or leave it out", file.path, number,
                       kHollow);
      }
    });
  }
}

TEST(Tidy, NothingPointsOutOfTheTree) {
  const std::string kOutside[] = {std::string("/wo") + "rk/", std::string("../sh") + "ared"};
  Violations violations;
  for (const File& file : Tree()) {
    ForEachLine(file.text, [&](const std::string& line, size_t number) {
      for (const std::string& path : kOutside) {
        if (line.find(path) != line.npos) {
          violations.Add("{}:{}: '{}' is not there in a clone: name what it holds instead",
                         file.path, number, path);
        }
      }
    });
  }
}

// The anchor that a heading gets on the usual forges: lower case, punctuation gone, '-' for ' '.
std::string Anchor(std::string_view heading) {
  std::string anchor;
  for (const char c : heading) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == ' ' || c == '-') {
      anchor += '-';
    } else if (IsWordCharacter(c) || byte >= 0x80) {
      anchor += static_cast<char>(std::tolower(byte));
    }
  }
  return anchor;
}

// Calls visit(line, number) for the lines of a page outside its code blocks.
template <typename Visit>
void ForEachProseLine(const std::string& text, Visit visit) {
  bool code = false;
  ForEachLine(text, [&](const std::string& line, size_t number) {
    if (line.find("```") != line.npos) {
      code = !code;
    } else if (!code) {
      visit(line, number);
    }
  });
}

std::set<std::string> AnchorsOf(const std::string& page) {
  std::set<std::string> anchors;
  ForEachProseLine(page, [&](const std::string& line, size_t) {
    const size_t level = line.find_first_not_of('#');
    if (level == 0 || level == line.npos || line[level] != ' ') return;
    anchors.insert(Anchor(std::string_view(line).substr(level + 1)));
  });
  return anchors;
}

TEST(Tidy, LinksInTheDocumentationResolve) {
  std::map<std::string, std::set<std::string>> anchors;  // page -> its anchors
  for (const File& file : Tree()) {
    if (file.extension == ".md") anchors[file.path] = AnchorsOf(file.text);
  }
  Violations violations;
  for (const File& file : Tree()) {
    if (file.extension != ".md") continue;
    ForEachProseLine(file.text, [&](const std::string& line, size_t number) {
      for (size_t at = line.find("]("); at != line.npos; at = line.find("](", at + 2)) {
        const size_t close = line.find(')', at);
        if (close == line.npos) break;
        const std::string link = line.substr(at + 2, close - at - 2);
        if (link.find("://") != link.npos || link.starts_with("mailto:")) continue;
        const std::string target = link.substr(0, link.find('#'));
        const fs::path page = target.empty()
                                  ? fs::path(file.path)
                                  : (fs::path(file.path).parent_path() / target).lexically_normal();
        if (!Exists(page)) {
          violations.Add("{}:{}: the link to {} leads nowhere", file.path, number, link);
        } else if (const size_t hash = link.find('#'); hash != link.npos) {
          const auto known = anchors.find(page.generic_string());
          if (known != anchors.end() && !known->second.contains(link.substr(hash + 1))) {
            violations.Add("{}:{}: {} has no heading #{}", file.path, number, page.string(),
                           link.substr(hash + 1));
          }
        }
      }
    });
  }
}

TEST(Tidy, PathsNamedInTheDocumentationExist) {
  static const std::set<std::string> kFolders = {
      "base",  "transport", "cluster", "cache_service", "kernels",  "node",
      "tests", "docs",      "scripts", "cmake",         "examples", "models"};
  Violations violations;
  for (const File& file : Tree()) {
    // History and decisions may name what is gone.
    if (file.extension != ".md" || file.name == "CHANGELOG.md" ||
        file.path.starts_with("docs/adr/")) {
      continue;
    }
    ForEachProseLine(file.text, [&](const std::string& line, size_t number) {
      for (size_t open = line.find('`'); open != line.npos;) {
        const size_t close = line.find('`', open + 1);
        if (close == line.npos) break;
        std::string path = line.substr(open + 1, close - open - 1);
        open = line.find('`', close + 1);
        path = path.substr(0, path.find(' '));  // a command's arguments are not paths of the tree
        if (path.starts_with("./")) path.erase(0, 2);
        if (!kFolders.contains(FirstComponent(path)) || path.find_first_of("*{<$\\") != path.npos) {
          continue;
        }
        path = path.substr(0, path.find(':'));
        const bool exists = Exists(path) || Exists(path + ".cc") || Exists(path + ".h");
        if (!exists) violations.Add("{}:{}: {} does not exist", file.path, number, path);
      }
    });
  }
}

#ifdef KVANT_CLANG_FORMAT
TEST(Tidy, FormatIsClangFormats) {
  // One process a file would cost more than the formatting.
  std::string command = fmt::format("cd '{}' && '{}' --dry-run -Werror --ferror-limit=1",
                                    KVANT_SOURCE_DIR, KVANT_CLANG_FORMAT);
  for (const File& file : Tree()) {
    // Fragments (.inc) include one another in an order that the formatter would change.
    if (IsCpp(file) && file.extension != ".inc") command += " '" + file.path + "'";
  }
  command += " 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr) << "could not start " << KVANT_CLANG_FORMAT;
  std::set<std::string> wrong;
  std::string output;
  char line[4096];
  while (std::fgets(line, sizeof line, pipe) != nullptr) {
    const std::string text = line;
    output += text;
    if (text.find("[-Wclang-format-violations]") != text.npos) {
      wrong.insert(text.substr(0, text.find(": error")));
    }
  }
  const int exit_status = pclose(pipe);
  Violations violations;
  for (const std::string& place : wrong) {
    const std::string path = place.substr(0, place.find(':'));
    violations.Add("{}: run: {} -i {}", place, KVANT_CLANG_FORMAT, path);
  }
  if (exit_status != 0 && wrong.empty()) violations.Add("clang-format failed:\n{}", output);
}
#endif

}  // namespace
}  // namespace kvant
