// Decompression of one gRPC message (gzip, or deflate in zlib's format) with a limit on what it opens to.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "util/status.h"

namespace tidegate {

// Replaces *out with the decompressed message. kMessageTooLarge as soon as it passes `limit_bytes` (nothing beyond is
// produced), kInternal when the data is damaged, cut or followed by something else.
Status Inflate(std::span<const std::byte> message, size_t limit_bytes, std::vector<std::byte>* out);

}  // namespace tidegate
