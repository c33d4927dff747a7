#include "grpc/inflate.h"

#include <zlib.h>

#include <algorithm>
#include <string>

namespace tidegate {

Status Inflate(std::span<const std::byte> message, size_t limit_bytes, std::vector<std::byte>* out) {
  out->clear();
  z_stream stream{};
  // 15 + 32: the largest window, gzip or zlib found out from the header.
  if (inflateInit2(&stream, 15 + 32) != Z_OK)
    return Status::Error(Reason::kInternal, "no memory to decompress a message");
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(message.data()));
  stream.avail_in = static_cast<uInt>(message.size());
  int result = Z_OK;
  size_t produced = 0;
  while (result == Z_OK) {
    if (produced > limit_bytes) break;
    // Grow with what was really produced, so that a lying header costs nothing.
    const size_t step = std::clamp<size_t>(produced, 16 << 10, 4 << 20);
    out->resize(std::min(produced + step, limit_bytes + 1));
    stream.next_out = reinterpret_cast<Bytef*>(out->data() + produced);
    stream.avail_out = static_cast<uInt>(out->size() - produced);
    result = inflate(&stream, Z_NO_FLUSH);
    produced = out->size() - stream.avail_out;
    if (result == Z_BUF_ERROR && stream.avail_out == 0) result = Z_OK;
  }
  const bool all_read = stream.avail_in == 0;
  inflateEnd(&stream);
  if (produced > limit_bytes) {
    out->clear();
    return Status::Error(Reason::kMessageTooLarge,
                         "message is larger than " + std::to_string(limit_bytes) + " bytes after decompression");
  }
  out->resize(produced);
  if (result != Z_STREAM_END || !all_read) {
    out->clear();
    return Status::Error(Reason::kInternal, "compressed message is damaged");
  }
  return Status::Ok();
}

}  // namespace tidegate
