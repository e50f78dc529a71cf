kvant_test(codec_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(attention_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(linear_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(vector_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
