// libibverbs, looked up at run time, and one device of it.
#pragma once

#include <infiniband/verbs.h>

#include <cstdint>
#include <memory>
#include <string>

#include "base/status.h"

namespace kvant::verbs {

// The functions of libibverbs that are symbols of it. Posting and polling are inline functions of
// its header, which call the device's driver. Immutable.
struct Library {
  decltype(&::ibv_get_device_list) get_device_list;
  decltype(&::ibv_free_device_list) free_device_list;
  decltype(&::ibv_get_device_name) get_device_name;
  decltype(&::ibv_open_device) open_device;
  decltype(&::ibv_close_device) close_device;
  decltype(&::ibv_query_device) query_device;
  decltype(&::ibv_query_port) query_port;
  decltype(&::_ibv_query_gid_ex) query_gid;
  decltype(&::ibv_alloc_pd) alloc_pd;
  decltype(&::ibv_dealloc_pd) dealloc_pd;
  decltype(&::ibv_reg_mr) reg_mr;
  decltype(&::ibv_dereg_mr) dereg_mr;
  decltype(&::ibv_create_comp_channel) create_channel;
  decltype(&::ibv_destroy_comp_channel) destroy_channel;
  decltype(&::ibv_create_cq) create_cq;
  decltype(&::ibv_destroy_cq) destroy_cq;
  decltype(&::ibv_get_cq_event) get_cq_event;
  decltype(&::ibv_ack_cq_events) ack_cq_events;
  decltype(&::ibv_create_qp) create_qp;
  decltype(&::ibv_modify_qp) modify_qp;
  decltype(&::ibv_destroy_qp) destroy_qp;
  decltype(&::ibv_wc_status_str) status_text;
};

// Loaded once and kept. kUnsupported: it is not installed, or too old.
Result<const Library*> LoadLibrary();

// What verbs has made, with the function that unmakes it.
template <typename T>
using Owned = std::unique_ptr<T, int (*)(T*)>;

// An open device with a protection domain. Single-owner; outlives all that is made of it.
class Device {
 public:
  // `name` empty: KVANT_RDMA_DEVICE, else the first that can be used. kUnsupported: there is none.
  static Result<std::unique_ptr<Device>> Open(const std::string& name);
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const Library& library() const { return *library_; }
  ibv_context* context() const { return context_.get(); }
  ibv_pd* domain() const { return domain_.get(); }
  // Where peers find its port.
  uint8_t port() const { return port_; }
  uint16_t lid() const { return lid_; }
  const ibv_gid& gid() const { return gid_; }
  uint8_t gid_index() const { return gid_index_; }
  bool is_ethernet() const { return is_ethernet_; }
  ibv_mtu mtu() const { return mtu_; }
  uint32_t max_message_bytes() const { return max_message_bytes_; }
  // RDMA reads at once that it answers, and that it begins.
  uint8_t max_reads_answered() const { return max_reads_answered_; }
  uint8_t max_reads_begun() const { return max_reads_begun_; }
  // Whether a window keeps its peer inside its own range. Soft-RoCE looks no closer than at the
  // range of the registered memory below the window.
  bool windows_keep_bounds() const { return windows_keep_bounds_; }

  // kResourceExhausted: the limit of locked memory, or the device's.
  Result<Owned<ibv_mr>> Register(void* begin, size_t bytes, int access) const;

 private:
  Device(const Library* library, Owned<ibv_context> context);
  // Whether it is of use here; fills in the rest.
  Status Examine();
  Status FindGid();

  const Library* library_;
  Owned<ibv_context> context_;
  Owned<ibv_pd> domain_;
  uint8_t port_ = 0;
  uint16_t lid_ = 0;
  ibv_gid gid_{};
  uint8_t gid_index_ = 0;
  bool is_ethernet_ = false;
  ibv_mtu mtu_ = IBV_MTU_1024;
  uint32_t max_message_bytes_ = 0;
  uint8_t max_reads_answered_ = 0;
  uint8_t max_reads_begun_ = 0;
  bool windows_keep_bounds_ = false;
};

}  // namespace kvant::verbs
