#include "infer/codec.h"

#include <sys/random.h>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstring>
#include <limits>
#include <map>

#include "util/dcheck.h"

namespace tidegate {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors travel little-endian and are copied as they are");

// -- reading protobuf -------------------------------------------------------------------------------------------------

// Messages and groups together may be nested this deep, as in the official parsers.
constexpr int kMaxDepth = 100;

enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kDelimited = 2, kStartGroup = 3, kEndGroup = 4, kFixed32 = 5 };

// Why a message is refused, for people; nullptr: it is not.
using Fault = const char*;

constexpr Fault kBadTag = "a field has no valid tag";
constexpr Fault kBadVarint = "a number does not end";
constexpr Fault kBadLength = "a field is longer than what is left";
constexpr Fault kBadUnknown = "an unknown field is broken or nested too deep";
constexpr Fault kBadPacked = "a packed field ends inside a value";

using Cursor = const uint8_t*;

// The functions below return where the value ends, or nullptr when it does not end before `end`. REQUIRES: at < end,
// but for those that say otherwise.

[[gnu::noinline]] Cursor LongVarint(Cursor at, Cursor end, uint64_t* value) {
  uint64_t result = 0;
  for (int shift = 0; shift < 70 && at < end; shift += 7) {
    const uint8_t byte = *at++;
    result |= static_cast<uint64_t>(byte & 0x7f) << shift;  // The tenth byte has one bit of use; the rest is dropped.
    if (byte < 0x80) {
      *value = result;
      return at;
    }
  }
  return nullptr;
}

// Any at <= end.
inline Cursor ReadVarint(Cursor at, Cursor end, uint64_t* value) {
  if (at < end && *at < 0x80) [[likely]] {
    *value = *at;
    return at + 1;
  }
  return LongVarint(at, end, value);
}

[[gnu::noinline]] Cursor LongTag(Cursor at, Cursor end, uint32_t* tag) {
  uint64_t value = 0;
  Cursor after = LongVarint(at, end, &value);
  if (!after || after - at > 5 || value > std::numeric_limits<uint32_t>::max()) return nullptr;
  *tag = static_cast<uint32_t>(value);
  return after;
}

inline Cursor ReadTag(Cursor at, Cursor end, uint32_t* tag) {
  if (*at < 0x80) [[likely]] {
    *tag = *at;
    return at + 1;
  }
  return LongTag(at, end, tag);
}

// Any at <= end.
inline Cursor ReadDelimited(Cursor at, Cursor end, std::string_view* bytes) {
  uint64_t length = 0;
  at = ReadVarint(at, end, &length);
  if (!at || length > static_cast<size_t>(end - at)) return nullptr;
  *bytes = {reinterpret_cast<const char*>(at), static_cast<size_t>(length)};
  return at + length;
}

// Passes over the value of a field that is not ours. `depth`: how many groups may be open in it.
[[gnu::noinline]] Cursor SkipValue(Cursor at, Cursor end, uint32_t tag, int depth) {
  uint32_t open[kMaxDepth];
  int n_open = 0;
  for (;;) {
    if (tag >> 3 == 0) return nullptr;
    uint64_t number = 0;
    std::string_view bytes;
    switch (tag & 7) {
      case kVarint: at = ReadVarint(at, end, &number); break;
      case kFixed64: at = end - at < 8 ? nullptr : at + 8; break;
      case kDelimited: at = ReadDelimited(at, end, &bytes); break;
      case kStartGroup:
        if (n_open == depth) return nullptr;
        open[n_open++] = tag >> 3;
        break;
      case kEndGroup:
        if (n_open == 0 || open[--n_open] != tag >> 3) return nullptr;
        break;
      case kFixed32: at = end - at < 4 ? nullptr : at + 4; break;
      default: return nullptr;
    }
    if (!at || n_open == 0) return at;
    if (at == end) return nullptr;
    at = ReadTag(at, end, &tag);
    if (!at) return nullptr;
  }
}

inline Cursor Begin(std::string_view bytes) { return reinterpret_cast<Cursor>(bytes.data()); }
inline Cursor End(std::string_view bytes) { return Begin(bytes) + bytes.size(); }

// -- UTF-8 ------------------------------------------------------------------------------------------------------------

[[gnu::noinline]] bool IsUtf8Slow(std::string_view text) {
  Cursor at = Begin(text);
  const Cursor end = End(text);
  while (at < end) {
    const uint8_t lead = *at++;
    if (lead < 0x80) continue;
    // The second byte's range carries all that is special: no overlong form, no surrogate, nothing above U+10FFFF.
    int more = 0;
    uint8_t low = 0x80;
    uint8_t high = 0xbf;
    if (lead >= 0xc2 && lead <= 0xdf) {
      more = 1;
    } else if (lead >= 0xe0 && lead <= 0xef) {
      more = 2;
      if (lead == 0xe0) low = 0xa0;
      if (lead == 0xed) high = 0x9f;
    } else if (lead >= 0xf0 && lead <= 0xf4) {
      more = 3;
      if (lead == 0xf0) low = 0x90;
      if (lead == 0xf4) high = 0x8f;
    } else {
      return false;
    }
    if (end - at < more || *at < low || *at > high) return false;
    for (int i = 1; i < more; ++i) {
      if ((at[i] & 0xc0) != 0x80) return false;
    }
    at += more;
  }
  return true;
}

inline bool IsUtf8(std::string_view text) {
  constexpr uint64_t kHighBits = 0x8080808080808080;
  const char* at = text.data();
  size_t left = text.size();
  uint64_t seen = 0;
  for (; left >= 8; at += 8, left -= 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    seen |= word;
  }
  for (; left > 0; ++at, --left) seen |= static_cast<uint8_t>(*at);
  return (seen & kHighBits) == 0 || IsUtf8Slow(text);
}

// -- parameters -------------------------------------------------------------------------------------------------------

enum class Member : uint8_t { kNone, kBool, kInt64, kString, kDouble, kUint64 };

struct Parameter {
  Member member = Member::kNone;
  uint64_t number = 0;  // bool, int64 (two's complement), uint64
  std::string_view text;

  int64_t integer() const { return static_cast<int64_t>(number); }
};

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
  *value = {};
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

enum RequestParameter : uint8_t {
  kPriority,
  kTimeout,
  kStickyKey,
  kSequenceId,
  kSequenceStart,
  kSequenceEnd,
  kEmptyFinalResponse,
  kRequestParameters,  // how many
};
constexpr std::string_view kRequestParameterNames[kRequestParameters] = {
    "priority",
    "timeout",
    "sticky_key",
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "triton_enable_empty_final_response",
};
constexpr std::string_view kReservedPrefix = "triton_";

// The parameters of one request while its message is read. A name that comes again replaces what it said before, so
// nothing is judged before the end.
struct RequestParameters {
  uint32_t seen = 0;  // bit: RequestParameter
  bool any_without_value = false;
  bool any_reserved = false;
  std::string_view reserved;
  Parameter values[kRequestParameters];
};

// A parameter of the wrong kind; the message is written when the model's name is known.
struct ParameterFault {
  const char* expectation = nullptr;  // nullptr: there is none
  const char* side = nullptr;         // "input", "output"; nullptr: of the request
  std::string_view tensor;
  std::string_view parameter;

  void Set(const char* expected, std::string_view name) {
    if (expectation) return;
    expectation = expected;
    parameter = name;
  }
};

void Note(std::string_view key, const Parameter& value, RequestParameters* out) {
  for (int i = 0; i < kRequestParameters; ++i) {
    if (key != kRequestParameterNames[i]) continue;
    out->seen |= 1u << i;
    out->values[i] = value;
    return;
  }
  if (key.starts_with(kReservedPrefix)) {
    out->any_reserved = true;
    out->reserved = key;
  } else if (value.member == Member::kNone) {
    out->any_without_value = true;
  }
}

// The first parameter that has no value once all repeats are replaced. A rare second look at a message that parsed.
bool FindWithoutValue(std::string_view body, std::string_view* name) {
  std::map<std::string_view, bool> has_value;
  Cursor at = Begin(body);
  const Cursor end = End(body);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (tag != 0x22) {
      at = SkipValue(at, end, tag, kMaxDepth);
      continue;
    }
    std::string_view entry;
    std::string_view key;
    Parameter value;
    at = ReadDelimited(at, end, &entry);
    ParseEntry(entry, kMaxDepth - 1, &key, &value);
    has_value[key] = value.member != Member::kNone;
  }
  for (const auto& [key, has] : has_value) {
    if (has) continue;
    *name = key;
    return true;
  }
  return false;
}

void JudgeParameters(std::string_view body, const RequestParameters& parameters, ParsedRequest* out,
                     ParameterFault* fault) {
  const auto given = [&](RequestParameter which) -> const Parameter* {
    return parameters.seen >> which & 1 ? &parameters.values[which] : nullptr;
  };
  if (const Parameter* priority = given(kPriority)) {
    const bool is_good =
        priority->member == Member::kUint64 || (priority->member == Member::kInt64 && priority->integer() >= 0);
    if (!is_good) fault->Set("a uint64_param, or an int64_param that is not negative", "priority");
    out->priority = priority->number;
  }
  if (const Parameter* timeout = given(kTimeout)) {
    if (timeout->member != Member::kInt64 || timeout->integer() < 0) {
      fault->Set("an int64_param of microseconds that is not negative", "timeout");
    }
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
      fault->Set("a string_param or an int64_param", "sticky_key");
    }
  }
  if (const Parameter* id = given(kSequenceId)) {
    if (id->member == Member::kInt64) {
      out->in_sequence = id->number != 0;
    } else if (id->member == Member::kString) {
      out->in_sequence = !id->text.empty();
    } else {
      fault->Set("an int64_param or a string_param", "sequence_id");
    }
  }
  for (const RequestParameter flag : {kSequenceStart, kSequenceEnd, kEmptyFinalResponse}) {
    const Parameter* value = given(flag);
    if (value && value->member != Member::kBool) fault->Set("a bool_param", kRequestParameterNames[flag]);
  }
  if (const Parameter* empty = given(kEmptyFinalResponse)) out->empty_final_response = empty->number != 0;
  if (parameters.any_reserved) {
    fault->Set("absent: names that begin with 'triton_' are reserved, and this one is not known here",
               parameters.reserved);
  }
  std::string_view name;
  if (parameters.any_without_value && !fault->expectation && FindWithoutValue(body, &name)) {
    fault->Set("a parameter with a value; it has none", name);
  }
}

// The parameters of one tensor that mean something here.
enum TensorParameter : uint8_t { kRegion, kOffset, kByteSize, kClassification, kTensorParameters };
constexpr std::string_view kTensorParameterNames[kTensorParameters] = {"shared_memory_region", "shared_memory_offset",
                                                                       "shared_memory_byte_size", "classification"};

struct TensorParameters {
  uint32_t seen = 0;
  Parameter values[kTensorParameters];

  bool uses_shared_memory() const { return seen & (1u << kRegion | 1u << kOffset | 1u << kByteSize); }
};

Fault ParseTensorParameter(std::string_view entry, int depth, TensorParameters* out) {
  std::string_view key;
  Parameter value;
  if (Fault fault = ParseEntry(entry, depth, &key, &value)) return fault;
  for (int i = 0; i < kTensorParameters; ++i) {
    if (key != kTensorParameterNames[i]) continue;
    out->seen |= 1u << i;
    out->values[i] = value;
  }
  return nullptr;
}

void JudgeTensorParameters(const TensorParameters& parameters, const char* side, std::string_view tensor,
                           ParameterFault* fault) {
  if (fault->expectation) return;
  const auto is_wrong = [&](TensorParameter which, Member member) {
    return (parameters.seen >> which & 1) && parameters.values[which].member != member;
  };
  if (is_wrong(kRegion, Member::kString)) fault->Set("a string_param", kTensorParameterNames[kRegion]);
  for (const TensorParameter which : {kOffset, kByteSize}) {
    if (is_wrong(which, Member::kInt64)) fault->Set("an int64_param", kTensorParameterNames[which]);
  }
  // On an input it is anybody's own parameter.
  if (side == std::string_view("output") && (parameters.seen >> kClassification & 1) &&
      (is_wrong(kClassification, Member::kInt64) || parameters.values[kClassification].integer() <= 0)) {
    fault->Set("an int64_param above 0", kTensorParameterNames[kClassification]);
  }
  if (!fault->expectation) return;
  fault->side = side;
  fault->tensor = tensor;
}

// -- typed contents ---------------------------------------------------------------------------------------------------

// The fields of InferTensorContents by number.
enum ContentsField : uint8_t {
  kNoContents = 0,
  kBoolContents = 1,
  kIntContents = 2,
  kInt64Contents = 3,
  kUintContents = 4,
  kUint64Contents = 5,
  kFp32Contents = 6,
  kFp64Contents = 7,
  kBytesContents = 8,
};
constexpr std::string_view kContentsNames[] = {
    "raw_input_contents alone", "bool_contents", "int_contents",  "int64_contents", "uint_contents",
    "uint64_contents",          "fp32_contents", "fp64_contents", "bytes_contents"};

constexpr ContentsField ContentsOf(DataType type) {
  switch (type) {
    case DataType::kBool: return kBoolContents;
    case DataType::kInt8:
    case DataType::kInt16:
    case DataType::kInt32: return kIntContents;
    case DataType::kInt64: return kInt64Contents;
    case DataType::kUint8:
    case DataType::kUint16:
    case DataType::kUint32: return kUintContents;
    case DataType::kUint64: return kUint64Contents;
    case DataType::kFp32: return kFp32Contents;
    case DataType::kFp64: return kFp64Contents;
    case DataType::kBytes: return kBytesContents;
    case DataType::kFp16:
    case DataType::kBf16:
    case DataType::kInvalid: return kNoContents;
  }
  return kNoContents;
}

constexpr WireType ElementWireType(uint32_t field) {
  return field == kFp32Contents ? kFixed32 : field == kFp64Contents ? kFixed64 : kVarint;
}

// Reads one InferTensorContents and shows its values as runs: (field, bytes of one or more values in a row, packed
// form). For bytes_contents a run is the one value. Stops when `visit` returns a fault, and returns it.
template <typename Visit>
Fault VisitContents(std::string_view message, int depth, Visit&& visit) {
  Cursor at = Begin(message);
  const Cursor end = End(message);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    const uint32_t field = tag >> 3;
    const uint32_t wire_type = tag & 7;
    const bool is_ours = field >= kBoolContents && field <= kBytesContents;
    if (is_ours && wire_type == kDelimited) {
      std::string_view run;
      at = ReadDelimited(at, end, &run);
      if (!at) return kBadLength;
      if (Fault fault = visit(static_cast<ContentsField>(field), run)) return fault;
    } else if (is_ours && field != kBytesContents && wire_type == ElementWireType(field)) {
      const Cursor value = at;
      at = SkipValue(at, end, tag, depth);
      if (!at) return kBadVarint;
      const std::string_view run(reinterpret_cast<const char*>(value), static_cast<size_t>(at - value));
      if (Fault fault = visit(static_cast<ContentsField>(field), run)) return fault;
    } else {
      at = SkipValue(at, end, tag, depth);
      if (!at) return kBadUnknown;
    }
  }
  return nullptr;
}

// Whether a run is made of whole values.
Fault CheckRun(ContentsField field, std::string_view run) {
  switch (field) {
    case kFp32Contents: return run.size() % 4 == 0 ? nullptr : kBadPacked;
    case kFp64Contents: return run.size() % 8 == 0 ? nullptr : kBadPacked;
    case kBytesContents: return nullptr;
    default: break;
  }
  uint64_t value = 0;
  for (Cursor at = Begin(run); at < End(run);) {
    at = ReadVarint(at, End(run), &value);
    if (!at) return kBadPacked;
  }
  return nullptr;
}

// -- the message ------------------------------------------------------------------------------------------------------

void AppendDim(uint64_t dim, ParsedInput* input) {
  if (input->shape.rank < kMaxRank) {
    input->shape.d[input->shape.rank++] = static_cast<int64_t>(dim);
  } else {
    input->shape_too_long = true;
  }
}

Fault ParseInput(std::string_view message, int depth, ParsedInput* out, ParameterFault* parameter_fault) {
  out->message = message;
  out->name = {};
  out->datatype = {};
  out->shape.rank = 0;
  out->shape_too_long = out->has_contents = out->uses_shared_memory = false;
  TensorParameters parameters;
  Cursor at = Begin(message);
  const Cursor end = End(message);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    std::string_view bytes;
    uint64_t number = 0;
    switch (tag) {
      case 0x0a:
        at = ReadDelimited(at, end, &out->name);
        if (!at) return kBadLength;
        if (!IsUtf8(out->name)) return "the name of an input is not UTF-8";
        break;
      case 0x12:
        at = ReadDelimited(at, end, &out->datatype);
        if (!at) return kBadLength;
        if (!IsUtf8(out->datatype)) return "the datatype of an input is not UTF-8";
        break;
      case 0x1a:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        for (Cursor dim = Begin(bytes); dim < End(bytes);) {
          dim = ReadVarint(dim, End(bytes), &number);
          if (!dim) return kBadPacked;
          AppendDim(number, out);
        }
        break;
      case 0x18:
        at = ReadVarint(at, end, &number);
        if (!at) return kBadVarint;
        AppendDim(number, out);
        break;
      case 0x22:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        if (Fault fault = ParseTensorParameter(bytes, depth - 1, &parameters)) return fault;
        break;
      case 0x2a:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        if (Fault fault = VisitContents(bytes, depth - 1, CheckRun)) return fault;
        out->has_contents = true;
        break;
      default:
        at = SkipValue(at, end, tag, depth);
        if (!at) return kBadUnknown;
    }
  }
  if (parameters.seen) {
    out->uses_shared_memory = parameters.uses_shared_memory();
    JudgeTensorParameters(parameters, "input", out->name, parameter_fault);
  }
  return nullptr;
}

Fault ParseOutput(std::string_view message, int depth, ParsedOutput* out, ParameterFault* parameter_fault) {
  TensorParameters parameters;
  Cursor at = Begin(message);
  const Cursor end = End(message);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    std::string_view bytes;
    switch (tag) {
      case 0x0a:
        at = ReadDelimited(at, end, &out->name);
        if (!at) return kBadLength;
        if (!IsUtf8(out->name)) return "the name of an output is not UTF-8";
        break;
      case 0x12:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        if (Fault fault = ParseTensorParameter(bytes, depth - 1, &parameters)) return fault;
        break;
      default:
        at = SkipValue(at, end, tag, depth);
        if (!at) return kBadUnknown;
    }
  }
  if (parameters.seen) {
    out->uses_shared_memory = parameters.uses_shared_memory();
    out->uses_classification = parameters.seen >> kClassification & 1;
    JudgeTensorParameters(parameters, "output", out->name, parameter_fault);
  }
  return nullptr;
}

Fault ParseMessage(std::string_view body, ParsedRequest* out, RequestParameters* parameters,
                   ParameterFault* parameter_fault) {
  Cursor at = Begin(body);
  const Cursor end = End(body);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    std::string_view bytes;
    switch (tag) {
      case 0x0a:
        at = ReadDelimited(at, end, &out->model_name);
        if (!at) return kBadLength;
        if (!IsUtf8(out->model_name)) return "model_name is not UTF-8";
        break;
      case 0x12:
        at = ReadDelimited(at, end, &out->model_version);
        if (!at) return kBadLength;
        if (!IsUtf8(out->model_version)) return "model_version is not UTF-8";
        break;
      case 0x1a:
        at = ReadDelimited(at, end, &out->id);
        if (!at) return kBadLength;
        if (!IsUtf8(out->id)) return "id is not UTF-8";
        break;
      case 0x22: {
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        std::string_view key;
        Parameter value;
        if (Fault fault = ParseEntry(bytes, kMaxDepth - 1, &key, &value)) return fault;
        Note(key, value, parameters);
        break;
      }
      case 0x2a: {
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        // One beyond the limit is read into the last place: it has to be valid and is not needed.
        const size_t index = std::min(out->n_inputs, kMostParsedInputs - 1);
        if (index == out->inputs.size()) out->inputs.emplace_back();
        ++out->n_inputs;
        if (Fault fault = ParseInput(bytes, kMaxDepth - 1, &out->inputs[index], parameter_fault)) return fault;
        break;
      }
      case 0x32: {
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        ParsedOutput output;
        if (Fault fault = ParseOutput(bytes, kMaxDepth - 1, &output, parameter_fault)) return fault;
        if (out->outputs.size() < kMostParsedOutputs) out->outputs.push_back(output);
        break;
      }
      case 0x3a:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        if (out->n_raw++ < kMostParsedInputs) out->raw.push_back(bytes);
        break;
      default:
        at = SkipValue(at, end, tag, kMaxDepth);
        if (!at) return kBadUnknown;
    }
  }
  return nullptr;
}

// -- refusals ---------------------------------------------------------------------------------------------------------

// A client's text inside a message: cut at a character's border, so that no message grows with what was sent.
std::string Quoted(std::string_view text) {
  constexpr size_t kMost = 64;
  if (text.size() <= kMost) return "'" + std::string(text) + "'";
  size_t length = kMost;
  while (length > 0 && (static_cast<uint8_t>(text[length]) & 0xc0) == 0x80) --length;
  return "'" + std::string(text.substr(0, length)) + "...'";
}

std::string ShapeText(const Dims& dims, bool is_cut = false) {
  std::string text = "[";
  for (int i = 0; i < dims.rank; ++i) text += (i ? "," : "") + std::to_string(dims.d[i]);
  return text + (is_cut ? ",...]" : "]");
}

std::string TypeText(const TensorSpec& tensor) {
  return std::string(WireName(tensor.type)) + " " + ShapeText(tensor.dims);
}

// The names of a side, as many as help.
std::string NamesText(const std::vector<TensorSpec>& tensors) {
  constexpr size_t kMost = 8;
  std::string text;
  for (size_t i = 0; i < tensors.size() && i < kMost; ++i) text += (i ? ", " : "") + Quoted(tensors[i].name);
  if (tensors.size() > kMost) text += " and " + std::to_string(tensors.size() - kMost) + " more";
  return text.empty() ? "none" : text;
}

[[gnu::cold]] Status RefuseModel(const ModelSpec& spec, const std::string& what) {
  return Status::Error(Reason::kInvalidTensor, "model " + Quoted(spec.name) + ": " + what);
}

[[gnu::cold]] Status RefuseInput(const ModelSpec& spec, const TensorSpec& input, const std::string& what) {
  return Status::Error(Reason::kInvalidTensor,
                       "model " + Quoted(spec.name) + ", input " + Quoted(input.name) + ": " + what);
}

[[gnu::cold]] Status Unsupported(const ModelSpec& spec, const std::string& what) {
  return Status::Error(Reason::kNotSupported, "model " + Quoted(spec.name) + what);
}

[[gnu::cold]] Status RefuseParameter(std::string_view model, const ParameterFault& fault) {
  std::string message = "model " + Quoted(model);
  if (fault.side) message += std::string(", ") + fault.side + " " + Quoted(fault.tensor);
  message += ": parameter " + Quoted(fault.parameter) + " must be " + fault.expectation;
  return Status::Error(Reason::kInvalidTensor, std::move(message));
}

// -- checking against the model ---------------------------------------------------------------------------------------

// A batch holds at most this many elements of one tensor, so that no product of sizes overflows further down whatever
// an element costs there.
constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 64;

// Where `name` is in `tensors`; tensors.size() when it is not. Clients mostly keep the model's order: `guess` first.
inline size_t Find(const std::vector<TensorSpec>& tensors, std::string_view name, size_t guess) {
  if (guess < tensors.size() && tensors[guess].name == name) return guess;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].name == name) return i;
  }
  return tensors.size();
}

// The parsed input of each input of the model. False with *status when one is missing, unknown or there twice.
bool MatchInputs(const ParsedRequest& parsed, const ModelSpec& spec, uint8_t (&of_spec)[kMaxInputs], Status* status) {
  const size_t n_parsed = std::min(parsed.n_inputs, kMostParsedInputs);
  uint64_t seen = 0;
  for (size_t j = 0; j < n_parsed; ++j) {
    const std::string_view name = parsed.inputs[j].name;
    const size_t i = Find(spec.inputs, name, j);
    if (i == spec.inputs.size()) [[unlikely]] {
      *status = RefuseModel(spec, "input " + Quoted(name) + " is not known; expected " + NamesText(spec.inputs));
      return false;
    }
    if (seen >> i & 1) [[unlikely]] {
      *status = RefuseInput(spec, spec.inputs[i], "it is given twice; expected once");
      return false;
    }
    seen |= uint64_t{1} << i;
    of_spec[i] = static_cast<uint8_t>(j);
    if (parsed.inputs[j].uses_shared_memory) [[unlikely]] {
      *status = Unsupported(
          spec, ", input " + Quoted(name) + ": shared memory is not supported; send the tensor in the message");
      return false;
    }
  }
  if (n_parsed != spec.inputs.size()) [[unlikely]] {
    const auto missing = static_cast<size_t>(std::countr_one(seen));
    *status = RefuseInput(spec, spec.inputs[missing], "it is missing; expected " + TypeText(spec.inputs[missing]));
    return false;
  }
  return true;
}

// All raw or none: one entry for each input, and no typed contents beside them.
bool CheckRawCount(const ParsedRequest& parsed, const ModelSpec& spec, const uint8_t (&of_spec)[kMaxInputs],
                   Status* status) {
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    if (!parsed.inputs[of_spec[i]].has_contents) [[likely]]
      continue;
    *status = RefuseInput(spec, spec.inputs[i], "it has contents beside raw_input_contents; expected one of the two");
    return false;
  }
  if (parsed.n_raw == parsed.n_inputs) [[likely]]
    return true;
  *status = RefuseModel(spec, "there are " + std::to_string(parsed.n_raw) + " raw_input_contents for " +
                                  std::to_string(parsed.n_inputs) + " inputs; expected one for each of " +
                                  NamesText(spec.inputs));
  return false;
}

// Why the shape of an input does not fit, once it is known that it does not.
[[gnu::cold]] Status RefuseShape(const ModelSpec& spec, const TensorSpec& tensor, const ParsedInput& input) {
  const std::string shape = "its shape is " + ShapeText(input.shape, input.shape_too_long);
  const std::string expected = "expected " + ShapeText(tensor.dims);
  if (input.shape_too_long || input.shape.rank != tensor.dims.rank) {
    return RefuseInput(spec, tensor, shape + "; " + expected + ", " + std::to_string(tensor.dims.rank) + " dimensions");
  }
  const auto dims = input.shape.span();
  if (std::any_of(dims.begin(), dims.end(), [](int64_t dim) { return dim < 0; })) {
    return RefuseInput(spec, tensor,
                       shape + ", with a negative dimension; " + expected + " with -1 replaced by a size");
  }
  return RefuseInput(spec, tensor, shape + "; " + expected + (spec.max_batch_size > 0 ? " with the rows first" : ""));
}

// Rank, dimensions, rows and element count. *rows is 0 until the first input has said how many there are.
bool CheckShape(const ModelSpec& spec, const TensorSpec& tensor, const ParsedInput& input, uint32_t* rows,
                int64_t* count, Status* status) {
  const Dims& want = tensor.dims;
  const Dims& have = input.shape;
  bool fits = have.rank == want.rank && !input.shape_too_long;
  bool empty = false;
  bool overflows = false;
  int64_t per_row = 1;
  const int first = spec.max_batch_size > 0 ? 1 : 0;
  if (fits) [[likely]] {
    for (int k = first; k < want.rank; ++k) {
      const int64_t dim = have.d[k];
      fits &= dim == want.d[k] || (want.d[k] == -1 && dim >= 0);
      empty |= dim == 0;
      overflows |= dim > 0 && __builtin_mul_overflow(per_row, dim, &per_row);
    }
    if (first == 1) fits &= have.d[0] >= 0;
  }
  if (!fits) [[unlikely]] {
    *status = RefuseShape(spec, tensor, input);
    return false;
  }
  int64_t most = 0;
  if (overflows || __builtin_mul_overflow(per_row, std::max<int64_t>(spec.max_batch_size, 1), &most) ||
      most > kMaxElements) [[unlikely]] {
    *status = RefuseInput(
        spec, tensor,
        "its shape " + ShapeText(have) + " has more elements than can be counted; expected " + TypeText(tensor));
    return false;
  }
  uint32_t here = 1;
  if (first == 1) {
    if (have.d[0] == 0 || have.d[0] > static_cast<int64_t>(spec.max_batch_size)) [[unlikely]] {
      *status = RefuseInput(spec, tensor,
                            "its shape " + ShapeText(have) + " has " + std::to_string(have.d[0]) +
                                " rows; expected 1 to " + std::to_string(spec.max_batch_size));
      return false;
    }
    here = static_cast<uint32_t>(have.d[0]);
  }
  if (*rows == 0) *rows = here;
  if (*rows != here) [[unlikely]] {
    *status = RefuseInput(spec, tensor,
                          "it has " + std::to_string(here) + " rows where input " + Quoted(spec.inputs[0].name) +
                              " has " + std::to_string(*rows) + "; expected as many in each input");
    return false;
  }
  *count = empty ? 0 : per_row * here;
  return true;
}

// BYTES: `count` strings, each behind its length, and nothing else.
bool CheckStrings(const ModelSpec& spec, const TensorSpec& tensor, std::string_view raw, const Dims& dims,
                  int64_t count, Status* status) {
  constexpr size_t kPrefix = sizeof(uint32_t);
  const char* at = raw.data();
  size_t left = raw.size();
  int64_t n = 0;
  for (; left > 0 && n < count; ++n) {
    uint32_t length = 0;
    if (left >= kPrefix) std::memcpy(&length, at, kPrefix);
    if (left < kPrefix || length > left - kPrefix) [[unlikely]] {
      const std::string which = "string " + std::to_string(n);
      *status = RefuseInput(
          spec, tensor,
          left < kPrefix
              ? which + " has " + std::to_string(left) + " bytes; expected a length of 4 bytes before each string"
              : which + " is said to have " + std::to_string(length) + " bytes; expected at most the " +
                    std::to_string(left - kPrefix) + " that are left");
      return false;
    }
    at += kPrefix + length;
    left -= kPrefix + length;
  }
  if (n != count || left != 0) [[unlikely]] {
    *status =
        RefuseInput(spec, tensor,
                    (left != 0 ? std::to_string(left) + " bytes are left over after " : "it has ") + std::to_string(n) +
                        " strings; expected " + std::to_string(count) + " for BYTES " + ShapeText(dims));
    return false;
  }
  return true;
}

bool CheckRaw(const ModelSpec& spec, const TensorSpec& tensor, std::string_view raw, const Dims& dims, int64_t count,
              Status* status) {
  if (tensor.type == DataType::kBytes) return CheckStrings(spec, tensor, raw, dims, count, status);
  const size_t bytes = static_cast<size_t>(count) * ElementBytes(tensor.type);
  if (raw.size() == bytes) [[likely]]
    return true;
  *status = RefuseInput(spec, tensor,
                        "it has " + std::to_string(raw.size()) + " bytes; expected " + std::to_string(bytes) + " for " +
                            std::string(WireName(tensor.type)) + " " + ShapeText(dims));
  return false;
}

// Each InferTensorContents of a parsed input, which is known to be well-formed.
template <typename Visit>
Fault VisitInputContents(const ParsedInput& input, Visit&& visit) {
  Cursor at = Begin(input.message);
  const Cursor end = End(input.message);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (tag != 0x2a) {
      at = SkipValue(at, end, tag, kMaxDepth);
      continue;
    }
    std::string_view contents;
    at = ReadDelimited(at, end, &contents);
    if (Fault fault = VisitContents(contents, kMaxDepth, visit)) return fault;
  }
  return nullptr;
}

size_t ValuesIn(ContentsField field, std::string_view run) {
  switch (field) {
    case kFp32Contents: return run.size() / 4;
    case kFp64Contents: return run.size() / 8;
    case kBytesContents: return 1;
    // Each number ends with its one byte below 0x80.
    default: return static_cast<size_t>(std::count_if(run.begin(), run.end(), [](char c) { return c >= 0; }));
  }
}

// First pass: the contents are the right field and as many values as the shape says. *bytes: how many their raw form
// has.
bool MeasureContents(const ModelSpec& spec, const TensorSpec& tensor, const ParsedInput& input, int64_t count,
                     size_t* bytes, Status* status) {
  const ContentsField want = ContentsOf(tensor.type);
  ContentsField other = kNoContents;
  size_t values = 0;
  size_t string_bytes = 0;
  VisitInputContents(input, [&](ContentsField field, std::string_view run) -> Fault {
    const size_t more = ValuesIn(field, run);
    if (field != want) {
      if (more > 0) other = field;
      return nullptr;
    }
    values += more;
    if (field == kBytesContents) string_bytes += sizeof(uint32_t) + run.size();
    return nullptr;
  });
  if (other != kNoContents) [[unlikely]] {
    *status = RefuseInput(spec, tensor,
                          "it has " + std::string(kContentsNames[other]) + "; expected " +
                              std::string(kContentsNames[want]) + " for " + std::string(WireName(tensor.type)));
    return false;
  }
  if (values != static_cast<uint64_t>(count)) [[unlikely]] {
    *status =
        RefuseInput(spec, tensor,
                    "it has " + std::to_string(values) + " values; expected " + std::to_string(count) + " in " +
                        (want == kNoContents ? "" : "raw_input_contents or ") + std::string(kContentsNames[want]) +
                        " for " + std::string(WireName(tensor.type)) + " " + ShapeText(input.shape));
    return false;
  }
  *bytes = tensor.type == DataType::kBytes ? string_bytes : values * ElementBytes(tensor.type);
  return true;
}

// Writes a run of numbers as elements of type To, read as the field's type From. False when one does not fit; *value.
template <typename From, typename To>
bool PutNumbers(std::string_view run, std::byte** to, int64_t* value) {
  for (Cursor at = Begin(run); at < End(run);) {
    uint64_t number = 0;
    at = ReadVarint(at, End(run), &number);
    const From from = static_cast<From>(number);
    const To element = static_cast<To>(from);
    if (static_cast<From>(element) != from) [[unlikely]] {
      *value = static_cast<int64_t>(from);
      return false;
    }
    std::memcpy(*to, &element, sizeof element);
    *to += sizeof element;
  }
  return true;
}

bool PutRun(DataType type, std::string_view run, std::byte** to, int64_t* value) {
  switch (type) {
    case DataType::kBool: return PutNumbers<bool, bool>(run, to, value);
    case DataType::kInt8: return PutNumbers<int32_t, int8_t>(run, to, value);
    case DataType::kInt16: return PutNumbers<int32_t, int16_t>(run, to, value);
    case DataType::kInt32: return PutNumbers<int32_t, int32_t>(run, to, value);
    case DataType::kInt64: return PutNumbers<int64_t, int64_t>(run, to, value);
    case DataType::kUint8: return PutNumbers<uint32_t, uint8_t>(run, to, value);
    case DataType::kUint16: return PutNumbers<uint32_t, uint16_t>(run, to, value);
    case DataType::kUint32: return PutNumbers<uint32_t, uint32_t>(run, to, value);
    case DataType::kUint64: return PutNumbers<uint64_t, uint64_t>(run, to, value);
    case DataType::kBytes: {
      const auto length = static_cast<uint32_t>(run.size());
      std::memcpy(*to, &length, sizeof length);
      *to += sizeof length;
      [[fallthrough]];
    }
    case DataType::kFp32:
    case DataType::kFp64:
      if (!run.empty()) std::memcpy(*to, run.data(), run.size());
      *to += run.size();
      return true;
    case DataType::kFp16:
    case DataType::kBf16:
    case DataType::kInvalid: return true;
  }
  return true;
}

// Second pass: writes the raw form to `to`, which MeasureContents has measured.
bool ConvertContents(const ModelSpec& spec, const TensorSpec& tensor, const ParsedInput& input, std::byte* to,
                     Status* status) {
  const ContentsField want = ContentsOf(tensor.type);
  const std::byte* const begin = to;
  int64_t value = 0;
  const Fault fault = VisitInputContents(input, [&](ContentsField field, std::string_view run) -> Fault {
    if (field != want) return nullptr;
    return PutRun(tensor.type, run, &to, &value) ? nullptr : "out of range";
  });
  if (!fault) [[likely]]
    return true;
  const auto element = static_cast<size_t>(to - begin) / ElementBytes(tensor.type);
  *status = RefuseInput(spec, tensor,
                        "element " + std::to_string(element) + " is " + std::to_string(value) + "; expected what " +
                            std::string(WireName(tensor.type)) + " can hold");
  return false;
}

// The inputs that come as typed contents, as raw form in request->scratch. `of_spec` as in MatchInputs; the element
// counts are in inputs[i].bytes and are replaced. Two passes, so that the views do not move.
bool ConvertInputs(const ParsedRequest& parsed, const ModelSpec& spec, const uint8_t (&of_spec)[kMaxInputs],
                   Request* request, Status* status) {
  size_t total = 0;
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    InputView& view = request->inputs[i];
    if (!MeasureContents(spec, spec.inputs[i], parsed.inputs[of_spec[i]], static_cast<int64_t>(view.bytes), &view.bytes,
                         status)) {
      return false;
    }
    total += view.bytes;
  }
  request->scratch.resize(total);
  std::byte* to = request->scratch.data();
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    InputView& view = request->inputs[i];
    view.data = to;
    if (view.bytes > 0 && !ConvertContents(spec, spec.inputs[i], parsed.inputs[of_spec[i]], to, status)) return false;
    to += view.bytes;
  }
  return true;
}

bool CheckRequestedOutputs(const ParsedRequest& parsed, const ModelSpec& spec, uint64_t* wanted, Status* status) {
  uint64_t mask = 0;
  for (size_t j = 0; j < parsed.outputs.size(); ++j) {
    const ParsedOutput& output = parsed.outputs[j];
    const size_t i = Find(spec.outputs, output.name, j);
    if (i == spec.outputs.size()) [[unlikely]] {
      *status =
          RefuseModel(spec, "output " + Quoted(output.name) + " is not known; expected " + NamesText(spec.outputs));
      return false;
    }
    if (mask >> i & 1) [[unlikely]] {
      *status = RefuseModel(spec, "output " + Quoted(output.name) + " is requested twice; expected once");
      return false;
    }
    if (output.uses_shared_memory || output.uses_classification) [[unlikely]] {
      *status = Unsupported(
          spec, ", output " + Quoted(output.name) +
                    (output.uses_shared_memory ? ": shared memory is not supported; leave its parameters out"
                                               : ": classification is not supported; leave the parameter out and rank "
                                                 "the values yourself"));
      return false;
    }
    mask |= uint64_t{1} << i;
  }
  *wanted = mask;
  return true;
}

// Keys of the shape hash, new in each process: a client cannot prepare shapes that collide.
struct ShapeSecret {
  uint64_t a = 0x9e3779b97f4a7c15;
  uint64_t b = 0xd1b54a32d192ed03;
  ShapeSecret() {
    uint64_t random[2];
    if (getrandom(random, sizeof random, GRND_NONBLOCK) != sizeof random) return;
    a ^= random[0];
    b ^= random[1];
  }
};
const ShapeSecret kShapeSecret;

inline uint64_t Mix(uint64_t hash, uint64_t value) {
  // The full product keeps every bit of both sides in play; its halves are folded.
  const auto product = static_cast<unsigned __int128>(hash ^ value) * (kShapeSecret.b | 1);
  return (static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64)) + kShapeSecret.a;
}

// Requests with the same key may share a batch. Different shapes have the same key once in 2^64 pairs; whoever runs a
// batch compares the dimensions themselves before it, so that a collision costs a bisection and never mixes shapes.
uint64_t ShapeKey(const ModelSpec& spec, const Request& request) {
  uint64_t hash = kShapeSecret.a;
  const int first = spec.max_batch_size > 0 ? 1 : 0;
  for (const InputView& input : request.inputs) {
    for (int k = first; k < input.dims.rank; ++k) hash = Mix(hash, static_cast<uint64_t>(input.dims.d[k]));
  }
  hash = Mix(hash, request.inputs.size());
  return hash != 0 ? hash : 1;
}

// -- writing protobuf -------------------------------------------------------------------------------------------------

constexpr size_t kPrefixBytes = 5;
constexpr size_t kMaxMessageBytes = std::numeric_limits<int32_t>::max();

constexpr size_t VarintBytes(uint64_t value) { return (static_cast<size_t>(std::bit_width(value | 1)) + 6) / 7; }

constexpr size_t DelimitedBytes(size_t length) { return 1 + VarintBytes(length) + length; }

// A string field; the empty string is left out, as proto3 wants it.
constexpr size_t StringBytes(std::string_view text) { return text.empty() ? 0 : DelimitedBytes(text.size()); }

inline std::byte* PutByte(std::byte* to, uint8_t byte) {
  *to = std::byte{byte};
  return to + 1;
}

inline std::byte* PutVarint(std::byte* to, uint64_t value) {
  while (value >= 0x80) {
    to = PutByte(to, static_cast<uint8_t>(value | 0x80));
    value >>= 7;
  }
  return PutByte(to, static_cast<uint8_t>(value));
}

inline std::byte* PutBytes(std::byte* to, const void* from, size_t length) {
  if (length > 0) std::memcpy(to, from, length);
  return to + length;
}

inline std::byte* PutString(std::byte* to, uint8_t tag, std::string_view text) {
  if (text.empty()) return to;
  to = PutByte(to, tag);
  to = PutVarint(to, text.size());
  return PutBytes(to, text.data(), text.size());
}

inline std::byte* PutPrefix(std::byte* to, size_t length) {
  to = PutByte(to, 0);  // not compressed
  for (int shift = 24; shift >= 0; shift -= 8) to = PutByte(to, static_cast<uint8_t>(length >> shift));
  return to;
}

// parameters { key: "triton_final_response" value { bool_param: true } }, tag and length included.
constexpr std::string_view kFinalResponse = "\x22\x1b\x0a\x15triton_final_response\x12\x02\x08\x01";
static_assert(kFinalResponse.size() == 29);

// What one request gets of one output.
struct Slice {
  const std::byte* data;
  size_t bytes;
  size_t shape_bytes;  // packed
  size_t meta_bytes;   // InferOutputTensor without tag and length
};

}  // namespace

void ParsedRequest::Reset() {
  model_name = model_version = id = sticky_key = {};
  n_inputs = n_raw = 0;
  outputs.clear();
  raw.clear();
  priority = 0;
  timeout_us = 0;
  empty_final_response = in_sequence = false;
}

Status ParseInferRequest(std::string_view body, ParsedRequest* out) {
  out->Reset();
  RequestParameters parameters;
  ParameterFault parameter_fault;
  if (Fault fault = ParseMessage(body, out, &parameters, &parameter_fault)) [[unlikely]] {
    return Status::Error(Reason::kMalformedMessage, std::string("the message is not a ModelInferRequest: ") + fault);
  }
  if (parameters.seen != 0 || parameters.any_reserved || parameters.any_without_value) {
    JudgeParameters(body, parameters, out, &parameter_fault);
  }
  if (parameter_fault.expectation) [[unlikely]]
    return RefuseParameter(out->model_name, parameter_fault);
  return Status::Ok();
}

Status CheckInferRequest(const ParsedRequest& parsed, const ModelSpec& spec, Request* request) {
  Status status;
  if (parsed.in_sequence) [[unlikely]] {
    return Unsupported(spec, ": parameter 'sequence_id' names a sequence; sequences are not supported, leave it out");
  }
  uint8_t of_spec[kMaxInputs];
  if (!MatchInputs(parsed, spec, of_spec, &status)) [[unlikely]]
    return status;
  const bool is_raw = parsed.n_raw > 0;
  if (is_raw && !CheckRawCount(parsed, spec, of_spec, &status)) [[unlikely]]
    return status;

  request->inputs.resize(spec.inputs.size());
  uint32_t rows = 0;
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    const TensorSpec& tensor = spec.inputs[i];
    const ParsedInput& input = parsed.inputs[of_spec[i]];
    InputView& view = request->inputs[i];
    if (input.datatype != WireName(tensor.type)) [[unlikely]] {
      return RefuseInput(spec, tensor, "its datatype is " + Quoted(input.datatype) + "; expected " + TypeText(tensor));
    }
    int64_t count = 0;
    if (!CheckShape(spec, tensor, input, &rows, &count, &status)) [[unlikely]]
      return status;
    view.dims = input.shape;
    view.bytes = static_cast<size_t>(count);  // until it is replaced: by the size of raw, or by ConvertInputs
    if (!is_raw) continue;
    const std::string_view raw = parsed.raw[of_spec[i]];
    if (!CheckRaw(spec, tensor, raw, input.shape, count, &status)) [[unlikely]]
      return status;
    view.data = reinterpret_cast<const std::byte*>(raw.data());
    view.bytes = raw.size();
  }
  if (!is_raw && !ConvertInputs(parsed, spec, of_spec, request, &status)) [[unlikely]]
    return status;

  TIDEGATE_DCHECK(!spec.outputs.empty() && spec.outputs.size() <= kMaxOutputs, "a served model has 1 to 64 outputs");
  request->outputs_wanted = ~uint64_t{0} >> (kMaxOutputs - spec.outputs.size());
  if (!parsed.outputs.empty() && !CheckRequestedOutputs(parsed, spec, &request->outputs_wanted, &status)) [[unlikely]] {
    return status;
  }
  request->id = parsed.id;
  request->rows = std::max(rows, 1u);  // a model without inputs has nothing to count
  request->priority = static_cast<uint32_t>(std::min<uint64_t>(parsed.priority, std::numeric_limits<uint32_t>::max()));
  request->timeout_us = parsed.timeout_us;
  request->empty_final_response = parsed.empty_final_response;
  request->shape_key = spec.has_free_dims ? ShapeKey(spec, *request) : 0;
  return status;
}

Status CheckOutputs(const ModelSpec& spec, std::span<const OutputView> outputs, uint32_t rows) {
  const auto refuse = [&](const std::string& what) {
    return Status::Error(Reason::kModelOutputInvalid, "model " + Quoted(spec.name) + what);
  };
  if (outputs.size() != spec.outputs.size()) [[unlikely]] {
    return refuse(": it gave " + std::to_string(outputs.size()) + " outputs; expected " +
                  std::to_string(spec.outputs.size()));
  }
  const bool batches = spec.max_batch_size > 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const TensorSpec& tensor = spec.outputs[i];
    const OutputView& output = outputs[i];
    bool fits = output.type == tensor.type && output.dims.rank == tensor.dims.rank;
    for (int k = 0; fits && k < tensor.dims.rank; ++k) {
      const int64_t want = k == 0 && batches ? static_cast<int64_t>(rows) : tensor.dims.d[k];
      fits = want == -1 ? output.dims.d[k] >= 0 : output.dims.d[k] == want;
    }
    const auto which = [&] { return ", output " + Quoted(tensor.name) + ": "; };
    if (!fits) [[unlikely]] {
      return refuse(which() + "the model gave " + std::string(WireName(output.type)) + " " + ShapeText(output.dims) +
                    "; expected " + TypeText(tensor) +
                    (batches ? " with " + std::to_string(rows) + " rows" : std::string()));
    }
    int64_t count = 0;
    size_t bytes = 0;
    bool is_whole = ElementCount(output.dims.span(), &count);
    if (output.type == DataType::kBytes) {
      const auto offsets = output.element_offsets;
      is_whole = is_whole && offsets.size() == static_cast<size_t>(count) + 1 && offsets.front() == 0 &&
                 offsets.back() == output.bytes && std::is_sorted(offsets.begin(), offsets.end());
    } else {
      is_whole = is_whole && !__builtin_mul_overflow(static_cast<size_t>(count), ElementBytes(output.type), &bytes) &&
                 bytes == output.bytes;
    }
    if (!is_whole || (output.bytes > 0 && output.data == nullptr)) [[unlikely]] {
      return refuse(which() + "the model gave " + std::to_string(output.bytes) + " bytes; expected the elements of " +
                    std::string(WireName(output.type)) + " " + ShapeText(output.dims));
    }
  }
  return Status::Ok();
}

void EncodeInferResponse(const ModelSpec& spec, std::span<const OutputView> outputs, uint32_t first_row,
                         Request* request) {
  const bool batches = spec.max_batch_size > 0;
  const uint64_t wanted = request->outputs_wanted;
  const auto dim = [&](const OutputView& output, int k) {
    return static_cast<uint64_t>(k == 0 && batches ? request->rows : output.dims.d[k]);
  };

  // What goes in, and how large it is.
  Slice slices[kMaxOutputs];
  size_t response = StringBytes(spec.name) + StringBytes(spec.version) + StringBytes(request->id);
  if (request->in_stream) response += kFinalResponse.size();
  size_t head = response;  // what stands before the raw contents
  for (uint64_t left = wanted; left != 0; left &= left - 1) {
    const auto i = static_cast<size_t>(std::countr_zero(left));
    const OutputView& output = outputs[i];
    Slice& slice = slices[i];
    slice.data = output.data;
    slice.bytes = output.bytes;
    if (batches) {
      const auto total = static_cast<size_t>(output.dims.d[0]);
      if (output.type == DataType::kBytes) {
        const size_t per_row = (output.element_offsets.size() - 1) / total;
        const size_t begin = output.element_offsets[first_row * per_row];
        slice.data += begin;
        slice.bytes = output.element_offsets[(first_row + request->rows) * per_row] - begin;
      } else {
        const size_t per_row = output.bytes / total;
        slice.data += first_row * per_row;
        slice.bytes = request->rows * per_row;
      }
    }
    slice.shape_bytes = 0;
    for (int k = 0; k < output.dims.rank; ++k) slice.shape_bytes += VarintBytes(dim(output, k));
    slice.meta_bytes = StringBytes(spec.outputs[i].name) + StringBytes(WireName(output.type)) +
                       (slice.shape_bytes ? DelimitedBytes(slice.shape_bytes) : 0);
    head += DelimitedBytes(slice.meta_bytes);
    response += DelimitedBytes(slice.meta_bytes) + DelimitedBytes(slice.bytes);
  }
  const size_t message = request->in_stream ? DelimitedBytes(response) : response;
  std::vector<std::byte>& reply = request->reply;
  reply.clear();
  if (message > kMaxMessageBytes) [[unlikely]] {
    request->status = Status::Error(Reason::kModelOutputInvalid,
                                    "model " + Quoted(spec.name) + ": the answer has " + std::to_string(message) +
                                        " bytes; expected less than the 2 GiB of a message");
    return;
  }

  // Room for all of it at once; the raw contents are then appended, which writes each byte of them once, where a resize
  // would fill them with zeros first.
  head += kPrefixBytes + message - response;
  reply.reserve(kPrefixBytes + message);
  reply.resize(head);
  std::byte* to = PutPrefix(reply.data(), message);
  if (request->in_stream) {
    to = PutByte(to, 0x12);
    to = PutVarint(to, response);
  }
  to = PutString(to, 0x0a, spec.name);
  to = PutString(to, 0x12, spec.version);
  to = PutString(to, 0x1a, request->id);
  if (request->in_stream) to = PutBytes(to, kFinalResponse.data(), kFinalResponse.size());
  for (uint64_t left = wanted; left != 0; left &= left - 1) {
    const auto i = static_cast<size_t>(std::countr_zero(left));
    const OutputView& output = outputs[i];
    to = PutByte(to, 0x2a);
    to = PutVarint(to, slices[i].meta_bytes);
    to = PutString(to, 0x0a, spec.outputs[i].name);
    to = PutString(to, 0x12, WireName(output.type));
    if (output.dims.rank == 0) continue;
    to = PutByte(to, 0x1a);
    to = PutVarint(to, slices[i].shape_bytes);
    for (int k = 0; k < output.dims.rank; ++k) to = PutVarint(to, dim(output, k));
  }
  for (uint64_t left = wanted; left != 0; left &= left - 1) {
    const Slice& slice = slices[std::countr_zero(left)];
    std::byte tag_and_length[11];
    std::byte* const end = PutVarint(PutByte(tag_and_length, 0x32), slice.bytes);
    reply.insert(reply.end(), tag_and_length, end);
    reply.insert(reply.end(), slice.data, slice.data + slice.bytes);
  }
}

void EncodeStreamError(std::string_view model_name, std::string_view model_version, std::string_view id,
                       std::string_view message, std::vector<std::byte>* reply) {
  const size_t response =
      StringBytes(model_name) + StringBytes(model_version) + StringBytes(id) + kFinalResponse.size();
  const size_t whole = StringBytes(message) + DelimitedBytes(response);
  reply->resize(kPrefixBytes + whole);
  std::byte* to = PutPrefix(reply->data(), whole);
  to = PutString(to, 0x0a, message);
  if (!IsUtf8(message)) {
    for (std::byte* at = to - message.size(); at < to; ++at) {
      if (static_cast<uint8_t>(*at) >= 0x80) *at = std::byte{'?'};
    }
  }
  to = PutByte(to, 0x12);
  to = PutVarint(to, response);
  to = PutString(to, 0x0a, model_name);
  to = PutString(to, 0x12, model_version);
  to = PutString(to, 0x1a, id);
  PutBytes(to, kFinalResponse.data(), kFinalResponse.size());
}

size_t GatherInput(std::span<Request* const> requests, size_t index, std::byte* to) {
  std::byte* const begin = to;
  for (const Request* request : requests) {
    const InputView& input = request->inputs[index];
    to = PutBytes(to, input.data, input.bytes);
  }
  return static_cast<size_t>(to - begin);
}

}  // namespace tidegate
