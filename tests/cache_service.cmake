kvant_test(cache_service_test LIBS kvant_cache_service LABELS unit TIMEOUT 120)
