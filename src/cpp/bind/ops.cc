// Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
#include "bind/bind.h"
#include "bind/ops_call.h"

namespace mrv1 {

void bind_ops(nb::module_& m) {
  nb::class_<OpsHandle> ops(m, "Ops",
                            "The backend table's ops on arrays of the caller. Use mrv1.ops, which "
                            "documents them.\n\n"
                            "Args:\n"
                            "    host: What the calls ask of Python, a mrv1.ops._host.Host.\n"
                            "    sync_launches: Whether to wait after every launch.\n"
                            "    check_slots: Whether to look at slots and scales on a GPU, too.");
  ops.def(
      "__init__",
      [](OpsHandle* self, nb::object host, bool sync_launches, bool check_slots) {
        new (self) OpsHandle(
            std::make_shared<OpsContext>(std::move(host), sync_launches, check_slots), "ops");
      },
      nb::arg("host"), nb::arg("sync_launches") = false, nb::arg("check_slots") = false);
  bind_packed_weights(ops, m);
  bind_dense_ops(ops);
  bind_moe_ops(ops);
  bind_attention_ops(ops, m);
  bind_block_ops(ops);
  bind_sampling_ops(ops);
}

}  // namespace mrv1
