kvant_test(codec_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
kvant_test(attention_test LIBS kvant_kernels LABELS unit TIMEOUT 120)
