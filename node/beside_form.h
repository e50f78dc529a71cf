// Blocks of one form that hold the attended payload besides, for readers over links on which its
// bytes are here sooner than fewer ones are decoded (docs/adr/0021).
#pragma once

#include <memory>

#include "base/status.h"
#include "node/attended_payload.h"
#include "node/stored_form.h"

namespace kvant::node {

// main: whole at any cut; its ways are the first of the result's. payload: rows of the attended
// payload of the same codec and model, exact: plain, or lossless. It is the last way, and gives
// what all cuts of main's first way give.
// kInvalidArgument: main has kMaxWays ways already.
Result<StoredFormPtr> MakeBesideForm(StoredFormPtr main, std::shared_ptr<const RowForm> payload,
                                     const AttendedPayload& attended);

}  // namespace kvant::node
