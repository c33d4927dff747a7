// The result of an operation that can be refused: a reason and a message for the person who asked.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "util/reason.h"

namespace tidegate {

struct Status {
  Reason reason = Reason::kOk;
  // Milliseconds after which a retry is worth it; negative: the client is told nothing about retrying.
  int32_t pushback_ms = -1;
  // What, which and what to do. Never a path, a stack or another caller's data.
  std::string message;

  bool ok() const { return reason == Reason::kOk; }

  static Status Ok() { return {}; }
  static Status Error(Reason reason, std::string message, int32_t pushback_ms = -1) {
    return Status{reason, pushback_ms, std::move(message)};
  }
};

}  // namespace tidegate
