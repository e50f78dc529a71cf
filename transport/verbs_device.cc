#include "transport/verbs_device.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>

namespace kvant::verbs {
namespace {

constexpr const char* kLibraryName = "libibverbs.so.1";
// More reads at once than this gain nothing and cost the device memory for each connection.
constexpr int kMaxReads = 16;
// What the kernel's software devices, rxe among them, say of who made them.
constexpr uint32_t kSoftwareVendor = 0xFFFFFF;
constexpr uint32_t kMaxGids = 256;

template <typename... Args>
Status Unsupported(fmt::format_string<Args...> format, Args&&... args) {
  return MakeStatus(StatusCode::kUnsupported, format, std::forward<Args>(args)...);
}

Result<Library> Load() {
  void* handle = dlopen(kLibraryName, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return Unsupported("no RDMA device: {} is not installed (package libibverbs1)", kLibraryName);
  }
  Library library{};
  const char* missing = nullptr;
  const auto find = [&](auto* function, const char* name) {
    void* found = dlsym(handle, name);
    if (found == nullptr) missing = name;
    std::memcpy(function, &found, sizeof(found));
  };
  find(&library.get_device_list, "ibv_get_device_list");
  find(&library.free_device_list, "ibv_free_device_list");
  find(&library.get_device_name, "ibv_get_device_name");
  find(&library.open_device, "ibv_open_device");
  find(&library.close_device, "ibv_close_device");
  find(&library.query_device, "ibv_query_device");
  find(&library.query_port, "ibv_query_port");
  find(&library.query_gid, "_ibv_query_gid_ex");
  find(&library.alloc_pd, "ibv_alloc_pd");
  find(&library.dealloc_pd, "ibv_dealloc_pd");
  find(&library.reg_mr, "ibv_reg_mr");
  find(&library.dereg_mr, "ibv_dereg_mr");
  find(&library.create_channel, "ibv_create_comp_channel");
  find(&library.destroy_channel, "ibv_destroy_comp_channel");
  find(&library.create_cq, "ibv_create_cq");
  find(&library.destroy_cq, "ibv_destroy_cq");
  find(&library.get_cq_event, "ibv_get_cq_event");
  find(&library.ack_cq_events, "ibv_ack_cq_events");
  find(&library.create_qp, "ibv_create_qp");
  find(&library.modify_qp, "ibv_modify_qp");
  find(&library.destroy_qp, "ibv_destroy_qp");
  find(&library.status_text, "ibv_wc_status_str");
  if (missing != nullptr) {
    return Unsupported("no RDMA device: {} has no {}; it is too old", kLibraryName, missing);
  }
  return library;
}

bool IsIpv4Mapped(const ibv_gid& gid) {
  constexpr std::array<uint8_t, 12> kPrefix = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF};
  return std::equal(kPrefix.begin(), kPrefix.end(), gid.raw);
}

}  // namespace

Result<const Library*> LoadLibrary() {
  static const Result<Library> library = Load();
  if (!library.ok()) return library.status();
  return &*library;
}

Device::Device(const Library* library, Owned<ibv_context> context)
    : library_(library), context_(std::move(context)), domain_(nullptr, library->dealloc_pd) {}

Result<std::unique_ptr<Device>> Device::Open(const std::string& name) {
  KV_ASSIGN_OR_RETURN(const Library* library, LoadLibrary());
  const char* from_environment = std::getenv("KVANT_RDMA_DEVICE");
  const std::string wanted = name.empty() && from_environment != nullptr ? from_environment : name;
  int count = 0;
  const std::unique_ptr<ibv_device*, void (*)(ibv_device**)> list(library->get_device_list(&count),
                                                                  library->free_device_list);
  if (list == nullptr || count == 0) {
    return Unsupported("no RDMA device: the kernel knows none (`rdma link` lists them)");
  }
  Status last = Unsupported("no RDMA device: none is called '{}'", wanted);
  for (int i = 0; i < count; ++i) {
    ibv_device* candidate = list.get()[i];
    if (!wanted.empty() && wanted != library->get_device_name(candidate)) continue;
    Owned<ibv_context> context(library->open_device(candidate), library->close_device);
    if (context == nullptr) {
      last = Unsupported("no RDMA device: opening {}: {}", library->get_device_name(candidate),
                         std::strerror(errno));
      continue;
    }
    std::unique_ptr<Device> device(new Device(library, std::move(context)));
    last = device->Examine();
    if (last.ok()) return device;
  }
  return last;
}

Status Device::Examine() {
  const char* name = library_->get_device_name(context_->device);
  ibv_device_attr facts{};
  if (library_->query_device(context_.get(), &facts) != 0) {
    return Unsupported("no RDMA device: {} does not say what it can do", name);
  }
  // Bound to one connection each: the only windows that no other peer can use.
  constexpr unsigned kWindows = IBV_DEVICE_MEM_WINDOW_TYPE_2A | IBV_DEVICE_MEM_WINDOW_TYPE_2B;
  if ((facts.device_cap_flags & kWindows) == 0) {
    return Unsupported("no RDMA device: {} has no memory windows of type 2", name);
  }
  windows_keep_bounds_ = facts.vendor_id != kSoftwareVendor;
  max_reads_answered_ = static_cast<uint8_t>(std::clamp(facts.max_qp_rd_atom, 1, kMaxReads));
  max_reads_begun_ = static_cast<uint8_t>(std::clamp(facts.max_qp_init_rd_atom, 1, kMaxReads));
  for (int port = 1; port <= facts.phys_port_cnt && port_ == 0; ++port) {
    ibv_port_attr attributes{};
    // The symbol fills in the part of the structure that was there from the beginning.
    if (library_->query_port(context_.get(), static_cast<uint8_t>(port),
                             reinterpret_cast<_compat_ibv_port_attr*>(&attributes)) != 0 ||
        attributes.state != IBV_PORT_ACTIVE) {
      continue;
    }
    port_ = static_cast<uint8_t>(port);
    lid_ = attributes.lid;
    mtu_ = attributes.active_mtu;
    max_message_bytes_ = attributes.max_msg_sz;
    is_ethernet_ = attributes.link_layer == IBV_LINK_LAYER_ETHERNET;
  }
  if (port_ == 0) return Unsupported("no RDMA device: no port of {} is up", name);
  KV_RETURN_IF_ERROR(FindGid());
  domain_.reset(library_->alloc_pd(context_.get()));
  if (domain_ == nullptr) {
    return Unsupported("no RDMA device: {} gives no protection domain: {}", name,
                       std::strerror(errno));
  }
  return OkStatus();
}

// Of an Ethernet port the one that routers forward: RoCE v2, and IPv4 before others, as addresses
// here are.
Status Device::FindGid() {
  bool found = false;
  for (uint32_t index = 0; index < kMaxGids; ++index) {
    ibv_gid_entry entry{};
    if (library_->query_gid(context_.get(), port_, index, &entry, 0, sizeof(entry)) != 0) continue;
    if (is_ethernet_ && entry.gid_type != IBV_GID_TYPE_ROCE_V2) continue;
    const bool best = !is_ethernet_ || IsIpv4Mapped(entry.gid);
    if (found && !best) continue;
    gid_ = entry.gid;
    gid_index_ = static_cast<uint8_t>(index);
    found = true;
    if (best) break;
  }
  if (found) return OkStatus();
  return Unsupported("no RDMA device: {} has no address for RoCE v2; give its interface one",
                     library_->get_device_name(context_->device));
}

Result<Owned<ibv_mr>> Device::Register(void* begin, size_t bytes, int access) const {
  Owned<ibv_mr> made(library_->reg_mr(domain_.get(), begin, bytes, access), library_->dereg_mr);
  if (made == nullptr) {
    return MakeStatus(StatusCode::kResourceExhausted,
                      "registering {} bytes with {}: {}; raise the limit of locked memory (ulimit "
                      "-l)",
                      bytes, library_->get_device_name(context_->device), std::strerror(errno));
  }
  return made;
}

}  // namespace kvant::verbs
