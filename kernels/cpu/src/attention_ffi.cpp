// XLA's view of paged attention: shapes are checked here, once, and never again inside.
#include <string>
#include <utility>

#include "ffi_pool.h"
#include "kernels.h"

namespace ffi = xla::ffi;

namespace tidemill {
namespace {

ffi::Error invalid(const std::string& what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

bool to_type(ffi::DataType found, Attention::Type& type) {
  switch (found) {
    case ffi::DataType::F32: type = Attention::Type::kFloat32; return true;
    case ffi::DataType::BF16: type = Attention::Type::kBfloat16; return true;
    case ffi::DataType::S8: type = Attention::Type::kInt8; return true;
    default: return false;
  }
}

ffi::Error attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer,
                  ffi::AnyBuffer, ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::F32>, ffi::Buffer<ffi::S32> query_start,
                  ffi::Buffer<ffi::S32> kv_len, ffi::Buffer<ffi::S32> page_table,
                  ffi::Buffer<ffi::S32> group_slot_start, ffi::Buffer<ffi::S32> group_slot_stop,
                  ffi::Buffer<ffi::S32> group_page_stop, ffi::Buffer<ffi::F32> sinks, ffi::Result<ffi::AnyBuffer> out,
                  ffi::Result<ffi::AnyBuffer> keys, ffi::Result<ffi::AnyBuffer> values,
                  ffi::Result<ffi::Buffer<ffi::F32>> key_scales, ffi::Result<ffi::Buffer<ffi::F32>> value_scales,
                  float scale, float soft_cap, int64_t window, int64_t chunk) {
  const auto queries = q.dimensions(), pages = keys->dimensions(), value_pages = values->dimensions();
  const auto table = page_table.dimensions(), new_keys = k.dimensions();
  if (queries.size() != 3 || pages.size() != 4 || value_pages.size() != 4 || table.size() != 2 || new_keys.size() != 3)
    return invalid("attention: q, k and v have 3 axes, pages 4, the page table 2");
  Attention args{};
  args.num_tokens = queries[0];
  args.num_heads = queries[1];
  args.head_dim = queries[2];
  args.num_pages = pages[0];
  args.num_kv_heads = pages[1];
  args.page_size = pages[3];
  args.num_slots = table[0];
  args.table_width = table[1];
  args.num_groups = group_slot_start.element_count();
  const bool is_consistent =
      pages[2] == args.head_dim && value_pages[0] == pages[0] && value_pages[1] == pages[1] &&
      value_pages[2] == args.page_size && value_pages[3] == args.head_dim && new_keys[0] == args.num_tokens &&
      new_keys[1] == args.num_kv_heads && new_keys[2] == args.head_dim && v.element_count() == k.element_count() &&
      args.num_kv_heads > 0 && args.num_heads % args.num_kv_heads == 0 &&
      static_cast<int64_t>(query_start.element_count()) == args.num_slots + 1 &&
      static_cast<int64_t>(kv_len.element_count()) == args.num_slots &&
      static_cast<int64_t>(group_slot_stop.element_count()) == args.num_groups &&
      static_cast<int64_t>(group_page_stop.element_count()) == args.num_groups;
  if (!is_consistent) return invalid("attention: the shapes of queries, pages, rows and groups do not agree");
  if (!to_type(q.element_type(), args.activation_type) || args.activation_type == Attention::Type::kInt8)
    return invalid("attention: queries are float32 or bfloat16");
  if (k.element_type() != q.element_type() || v.element_type() != q.element_type())
    return invalid("attention: k and v have the type of q");
  if (!to_type(keys->element_type(), args.page_type) || values->element_type() != keys->element_type())
    return invalid("attention: pages are float32, bfloat16 or int8");
  const int64_t num_scales = args.num_pages * args.num_kv_heads * args.page_size;
  if (args.page_type == Attention::Type::kInt8) {
    if (static_cast<int64_t>(key_scales->element_count()) != num_scales ||
        static_cast<int64_t>(value_scales->element_count()) != num_scales)
      return invalid("attention: int8 pages have one scale a token and KV head");
    args.key_scales = key_scales->typed_data();
    args.value_scales = value_scales->typed_data();
  }
  const int64_t num_sinks = sinks.element_count();
  if (num_sinks != 0 && num_sinks != args.num_heads) return invalid("attention: one sink a query head");
  args.q = q.untyped_data();
  args.k = k.untyped_data();
  args.v = v.untyped_data();
  args.keys = keys->untyped_data();
  args.values = values->untyped_data();
  args.query_start = query_start.typed_data();
  args.kv_len = kv_len.typed_data();
  args.page_table = page_table.typed_data();
  args.group_slot_start = group_slot_start.typed_data();
  args.group_slot_stop = group_slot_stop.typed_data();
  args.group_page_stop = group_page_stop.typed_data();
  args.sinks = num_sinks != 0 ? sinks.typed_data() : nullptr;
  args.out = out->untyped_data();
  args.scale = scale;
  args.soft_cap = soft_cap;
  args.window = window;
  args.chunk = chunk;
  XlaPool threads(std::move(pool));
  kernels().attention(args, threads);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tidemill

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(tidemill_attention, tidemill::attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()           // q
                                  .Arg<ffi::AnyBuffer>()           // k
                                  .Arg<ffi::AnyBuffer>()           // v
                                  .Arg<ffi::AnyBuffer>()           // keys, aliased to a result as the next three
                                  .Arg<ffi::AnyBuffer>()           // values
                                  .Arg<ffi::Buffer<ffi::F32>>()    // key scales
                                  .Arg<ffi::Buffer<ffi::F32>>()    // value scales
                                  .Arg<ffi::Buffer<ffi::S32>>()    // query_start
                                  .Arg<ffi::Buffer<ffi::S32>>()    // kv_len
                                  .Arg<ffi::Buffer<ffi::S32>>()    // page_table
                                  .Arg<ffi::Buffer<ffi::S32>>()    // group_slot_start
                                  .Arg<ffi::Buffer<ffi::S32>>()    // group_slot_stop
                                  .Arg<ffi::Buffer<ffi::S32>>()    // group_page_stop
                                  .Arg<ffi::Buffer<ffi::F32>>()    // sinks
                                  .Ret<ffi::AnyBuffer>()           // out
                                  .Ret<ffi::AnyBuffer>()           // keys
                                  .Ret<ffi::AnyBuffer>()           // values
                                  .Ret<ffi::Buffer<ffi::F32>>()    // key scales
                                  .Ret<ffi::Buffer<ffi::F32>>()    // value scales
                                  .Attr<float>("scale")
                                  .Attr<float>("soft_cap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunk"));
#pragma GCC visibility pop
