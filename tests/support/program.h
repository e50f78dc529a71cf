// Programs as a user runs them: started, watched, killed. For tests of kvant, kvantd and mpirun.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <string>
#include <vector>

#include "base/clock.h"

namespace kvant::support {

// A child process in a process group of its own, its output in files of a directory that goes with
// it. Killed, with all its children, if it still runs at the end. Single-owner.
class Program {
 public:
  // command: the path and its arguments; the environment is ours.
  explicit Program(std::vector<std::string> command);
  ~Program();
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  // The exit status, 128 + n when signal n ended it, -1 when it still runs after `at_most`.
  int Wait(Duration at_most);
  void Signal(int signal) const;
  std::string Out() const;
  std::string Errors() const;
  // Waits until stdout, or stderr, holds `text`. False: it did not within `at_most`, or ended.
  bool AwaitOut(const std::string& text, Duration at_most);
  bool AwaitErrors(const std::string& text, Duration at_most);

 private:
  bool Ended();
  bool Await(const std::string& path, const std::string& text, Duration at_most);

  std::string directory_;
  pid_t pid_ = -1;
  int status_ = -1;
  bool ended_ = false;
};

struct ProgramResult {
  int exit = -1;
  std::string out;
  std::string errors;
};
// Runs a program to its end; exit is -1 if that takes more than `at_most`.
ProgramResult RunProgram(const std::vector<std::string>& command,
                         Duration at_most = std::chrono::seconds(120));

// kvantd on a free port of this host, ready. Empty address: it did not start.
struct Shard {
  Program program;
  std::string address;  // "tcp://127.0.0.1:PORT"
  // listen: an address that an earlier one had, or with port 0.
  explicit Shard(const std::string& kvantd, const std::string& listen = "tcp://127.0.0.1:0");
};

}  // namespace kvant::support
