#include "infer/parameters.h"

#include <charconv>

namespace tidegate {
namespace {

using namespace protobuf;
using Member = Parameter::Member;

constexpr std::string_view kReservedPrefix = "triton_";

Fault ParseParameter(std::string_view message, int depth, Parameter* out) {
  Cursor at = Begin(message);
  const Cursor end = End(message);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    switch (tag) {
      case 0x08:
      case 0x10:
      case 0x28:
        at = ReadVarint(at, end, &out->number);
        if (!at) return kBadVarint;
        out->member = tag == 0x08 ? Member::kBool : tag == 0x10 ? Member::kInt64 : Member::kUint64;
        break;
      case 0x1a:
        at = ReadDelimited(at, end, &out->text);
        if (!at) return kBadLength;
        if (!IsUtf8(out->text)) return "a string_param is not UTF-8";
        out->member = Member::kString;
        break;
      case 0x21:
        if (end - at < 8) return kBadLength;
        at += 8;
        out->member = Member::kDouble;
        break;
      default:
        at = SkipValue(at, end, tag, depth);
        if (!at) return kBadUnknown;
    }
  }
  return nullptr;
}

// One entry of a parameter map. Its value may come in pieces, which are merged.
Fault ParseEntry(std::string_view entry, int depth, std::string_view* key, Parameter* value) {
  Cursor at = Begin(entry);
  const Cursor end = End(entry);
  *key = {};
  *value = Parameter{};
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    std::string_view piece;
    switch (tag) {
      case 0x0a:
        at = ReadDelimited(at, end, key);
        if (!at) return kBadLength;
        if (!IsUtf8(*key)) return "the name of a parameter is not UTF-8";
        break;
      case 0x12:
        at = ReadDelimited(at, end, &piece);
        if (!at) return kBadLength;
        if (Fault fault = ParseParameter(piece, depth - 1, value)) return fault;
        break;
      default:
        at = SkipValue(at, end, tag, depth);
        if (!at) return kBadUnknown;
    }
  }
  return nullptr;
}

// Passes over fields of a message that has been read until the next entry of its parameters. nullptr: there is none.
Cursor NextEntry(Cursor at, Cursor end, std::string_view* key, Parameter* value) {
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (tag != 0x22) {
      at = SkipValue(at, end, tag, kMaxDepth);
      continue;
    }
    std::string_view entry;
    at = ReadDelimited(at, end, &entry);
    ParseEntry(entry, kMaxDepth - 1, key, value);
    return at;
  }
  return nullptr;
}

// A name that has no value once all repeats are replaced. A second look at a message that has been read, which only an
// unusual one gets. Each name without a value costs a pass over the rest, so the names are bounded: beyond that, the
// next one is taken for the answer whatever replaces it.
bool FindWithoutValue(std::string_view body, std::string_view* name) {
  int passes_left = 16;
  const Cursor end = End(body);
  Parameter value{};
  for (Cursor at = NextEntry(Begin(body), end, name, &value); at; at = NextEntry(at, end, name, &value)) {
    if (value.member != Member::kNone) continue;
    if (passes_left-- == 0) return true;
    bool has_value = false;
    std::string_view later;
    for (Cursor ahead = NextEntry(at, end, &later, &value); ahead; ahead = NextEntry(ahead, end, &later, &value)) {
      if (later == *name) has_value = value.member != Member::kNone;
    }
    if (!has_value) return true;
  }
  return false;
}

}  // namespace

Fault RequestParameters::Add(std::string_view entry, int depth) {
  std::string_view key;
  Parameter value{};
  if (Fault fault = ParseEntry(entry, depth, &key, &value)) return fault;
  for (int name = 0; name < kNames; ++name) {
    if (key != kTexts[name]) continue;
    seen_ |= 1u << name;
    values_[name] = value;
    return nullptr;
  }
  if (key.starts_with(kReservedPrefix)) {
    any_reserved_ = true;
    reserved_ = key;
  } else if (value.member == Member::kNone) {
    any_without_value_ = true;
  }
  return nullptr;
}

void RequestParameters::Judge(std::string_view body, ParsedRequest* out, ParameterFault* fault) const {
  if (const Parameter* priority = given(kPriority)) {
    const bool is_good =
        priority->member == Member::kUint64 || (priority->member == Member::kInt64 && priority->integer() >= 0);
    if (!is_good) fault->Set("a uint64_param, or an int64_param that is not negative", kTexts[kPriority]);
    out->priority = priority->number;
  }
  if (const Parameter* timeout = given(kTimeout)) {
    const bool is_good = timeout->member == Member::kInt64 && timeout->integer() >= 0;
    if (!is_good) fault->Set("an int64_param of microseconds that is not negative", kTexts[kTimeout]);
    out->timeout_us = timeout->integer();
  }
  if (const Parameter* key = given(kStickyKey)) {
    if (key->member == Member::kString) {
      out->sticky_key = key->text;
    } else if (key->member == Member::kInt64) {
      char digits[24];
      const char* end = std::to_chars(digits, digits + sizeof digits, key->integer()).ptr;
      out->sticky_scratch.assign(digits, static_cast<size_t>(end - digits));
      out->sticky_key = out->sticky_scratch;
    } else {
      fault->Set("a string_param or an int64_param", kTexts[kStickyKey]);
    }
  }
  if (const Parameter* id = given(kSequenceId)) {
    if (id->member == Member::kInt64) {
      out->in_sequence = id->number != 0;
    } else if (id->member == Member::kString) {
      out->in_sequence = !id->text.empty();
    } else {
      fault->Set("an int64_param or a string_param", kTexts[kSequenceId]);
    }
  }
  for (const Name flag : {kSequenceStart, kSequenceEnd, kEmptyFinalResponse}) {
    const Parameter* value = given(flag);
    if (value && value->member != Member::kBool) fault->Set("a bool_param", kTexts[flag]);
  }
  if (const Parameter* empty = given(kEmptyFinalResponse)) out->empty_final_response = empty->number != 0;
  if (any_reserved_) {
    fault->Set("absent: names that begin with 'triton_' are reserved, and this one is not known here", reserved_);
  }
  std::string_view name;
  if (any_without_value_ && !fault->expectation && FindWithoutValue(body, &name)) fault->Set("given a value", name);
}

Fault TensorParameters::Add(std::string_view entry, int depth) {
  std::string_view key;
  Parameter value{};
  if (Fault fault = ParseEntry(entry, depth, &key, &value)) return fault;
  for (int name = 0; name < kNames; ++name) {
    if (key != kTexts[name]) continue;
    seen_ |= 1u << name;
    values_[name] = value;
  }
  return nullptr;
}

void TensorParameters::Judge(const char* side, bool classifies, std::string_view tensor, ParameterFault* fault) const {
  if (fault->expectation) return;
  const auto is_wrong = [&](Name name, Member member) { return (seen_ >> name & 1) && values_[name].member != member; };
  if (is_wrong(kRegion, Member::kString)) fault->Set("a string_param", kTexts[kRegion]);
  for (const Name name : {kOffset, kByteSize}) {
    if (is_wrong(name, Member::kInt64)) fault->Set("an int64_param", kTexts[name]);
  }
  if (classifies && has_classification() &&
      (is_wrong(kClassification, Member::kInt64) || values_[kClassification].integer() <= 0)) {
    fault->Set("an int64_param above 0", kTexts[kClassification]);
  }
  if (!fault->expectation) return;
  fault->side = side;
  fault->tensor = tensor;
}

}  // namespace tidegate
