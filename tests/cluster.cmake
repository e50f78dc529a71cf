kvant_test(shard_map_test LIBS kvant_cluster LABELS unit TIMEOUT 60)
kvant_test(membership_test LIBS kvant_cluster LABELS unit TIMEOUT 60)
