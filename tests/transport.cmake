# Tests of transport/.
kvant_test(transport_conformance_test SOURCES transport_suite.cc transport_peer.cc
  LIBS kvant_transport LABELS conformance TIMEOUT 120)
