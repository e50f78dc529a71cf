#include "tests/support/program.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "base/check.h"

namespace kvant::support {
namespace {

constexpr Duration kPause = std::chrono::milliseconds(1);

std::string Slurp(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return std::move(text).str();
}

}  // namespace

Program::Program(std::vector<std::string> command) {
  std::string name = (std::filesystem::temp_directory_path() / "kvant-program-XXXXXX").string();
  KV_CHECK(mkdtemp(name.data()) != nullptr);
  directory_ = name;
  const std::string out = directory_ + "/out";
  const std::string errors = directory_ + "/errors";
  std::vector<char*> argv;
  for (std::string& argument : command) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_ = fork();
  KV_CHECK(pid_ >= 0);
  if (pid_ == 0) {
    setpgid(0, 0);
    dup2(open("/dev/null", O_RDONLY), 0);
    dup2(open(out.c_str(), O_WRONLY | O_CREAT, 0600), 1);
    dup2(open(errors.c_str(), O_WRONLY | O_CREAT, 0600), 2);
    execv(argv[0], argv.data());
    _exit(127);
  }
  setpgid(pid_, pid_);
}

Program::~Program() {
  if (!Ended()) {
    kill(-pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  std::error_code ignored;
  std::filesystem::remove_all(directory_, ignored);
}

bool Program::Ended() {
  if (!ended_) ended_ = waitpid(pid_, &status_, WNOHANG) == pid_;
  return ended_;
}

int Program::Wait(Duration at_most) {
  const TimePoint deadline = SteadyClock().Now() + at_most;
  while (!Ended()) {
    if (SteadyClock().Now() >= deadline) return -1;
    std::this_thread::sleep_for(kPause);
  }
  return WIFEXITED(status_) ? WEXITSTATUS(status_) : 128 + WTERMSIG(status_);
}

void Program::Signal(int signal) const { kill(pid_, signal); }

std::string Program::Out() const { return Slurp(directory_ + "/out"); }

std::string Program::Errors() const { return Slurp(directory_ + "/errors"); }

bool Program::Await(const std::string& path, const std::string& text, Duration at_most) {
  const TimePoint deadline = SteadyClock().Now() + at_most;
  for (;;) {
    const bool last = Ended() || SteadyClock().Now() >= deadline;
    if (Slurp(path).find(text) != std::string::npos) return true;
    if (last) return false;
    std::this_thread::sleep_for(kPause);
  }
}

bool Program::AwaitOut(const std::string& text, Duration at_most) {
  return Await(directory_ + "/out", text, at_most);
}

bool Program::AwaitErrors(const std::string& text, Duration at_most) {
  return Await(directory_ + "/errors", text, at_most);
}

ProgramResult RunProgram(const std::vector<std::string>& command, Duration at_most) {
  Program program(command);
  ProgramResult result;
  result.exit = program.Wait(at_most);
  result.out = program.Out();
  result.errors = program.Errors();
  return result;
}

Shard::Shard(const std::string& kvantd, const std::string& listen)
    : program({kvantd, "--listen", listen, "--memory", "32MiB"}) {
  if (!program.AwaitOut("\n", std::chrono::seconds(20))) {
    ADD_FAILURE() << "kvantd is not ready: " << program.Errors();
    return;
  }
  const std::string line = program.Out();
  const size_t begin = line.find("tcp://");
  address = line.substr(begin, line.find(',') - begin);
}

}  // namespace kvant::support
