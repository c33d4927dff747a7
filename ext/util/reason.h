// Why a request or a load was refused or failed: one name for it everywhere (statuses, metrics, logs, docs).
//
// server/errors.py has the same names; a test compares the two.
#pragma once

#include <cstdint>
#include <string_view>

namespace tidegate {

enum class Reason : uint8_t {
  kOk = 0,
  kInvalidTensor,
  kMalformedMessage,
  kMessageTooLarge,
  kModelNotFound,
  kVersionNotFound,
  kVersionNotReady,
  kQueueFull,
  kTooLate,
  kBreakerOpen,
  kNodeDraining,
  kDeadlinePassed,
  kCancelled,
  kModelRaised,
  kModelOutputInvalid,
  kLoadFailed,
  kControlMode,
  kAlreadyExists,
  kNotSupported,
  kUnauthenticated,
  kNotAllowed,
  kInternal,
};
inline constexpr int kReasonCount = static_cast<int>(Reason::kInternal) + 1;

constexpr std::string_view ReasonName(Reason reason) {
  constexpr std::string_view kNames[kReasonCount] = {
      "OK",
      "INVALID_TENSOR",
      "MALFORMED_MESSAGE",
      "MESSAGE_TOO_LARGE",
      "MODEL_NOT_FOUND",
      "VERSION_NOT_FOUND",
      "VERSION_NOT_READY",
      "QUEUE_FULL",
      "TOO_LATE",
      "BREAKER_OPEN",
      "NODE_DRAINING",
      "DEADLINE_PASSED",
      "CANCELLED",
      "MODEL_RAISED",
      "MODEL_OUTPUT_INVALID",
      "LOAD_FAILED",
      "CONTROL_MODE",
      "ALREADY_EXISTS",
      "NOT_SUPPORTED",
      "UNAUTHENTICATED",
      "NOT_ALLOWED",
      "INTERNAL",
  };
  return kNames[static_cast<int>(reason)];
}

// The gRPC status number that a reason travels as.
constexpr int GrpcStatus(Reason reason) {
  switch (reason) {
    case Reason::kOk: return 0;
    case Reason::kCancelled: return 1;
    case Reason::kInvalidTensor: return 3;
    case Reason::kDeadlinePassed: return 4;
    case Reason::kModelNotFound:
    case Reason::kVersionNotFound: return 5;
    case Reason::kAlreadyExists: return 6;
    case Reason::kNotAllowed: return 7;
    case Reason::kMessageTooLarge:
    case Reason::kQueueFull:
    case Reason::kTooLate: return 8;
    case Reason::kControlMode: return 9;
    case Reason::kNotSupported: return 12;
    case Reason::kMalformedMessage:
    case Reason::kModelRaised:
    case Reason::kModelOutputInvalid:
    case Reason::kLoadFailed:
    case Reason::kInternal: return 13;
    case Reason::kVersionNotReady:
    case Reason::kBreakerOpen:
    case Reason::kNodeDraining: return 14;
    case Reason::kUnauthenticated: return 16;
  }
  return 13;
}

}  // namespace tidegate
