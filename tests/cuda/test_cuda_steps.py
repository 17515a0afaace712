"""Each step of `lola.kernels` on the device against the oracle's: the CPU's own tests, with CUDA tensors."""

from test_kernels import (                                            # noqa: F401
    test_a_short_loop_reproduces_attention, test_attend, test_attend_with_a_state_of_any_weight,
    test_attend_without_a_state_is_softmax, test_features, test_features_do_not_depend_on_place,
    test_features_of_extreme_values_are_finite, test_fold, test_score, test_score_bits_depend_on_pair_and_state_alone,
    test_score_of_an_empty_state_is_the_values_norm, test_select, test_the_loop_and_attention_agree_on_odd_shapes,
    test_the_same_arguments_are_right_otherwise)
