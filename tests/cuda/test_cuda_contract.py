"""The contract's invariants 1 to 9 on the device: the CPU's own tests, with CUDA tensors.

What is left out of test_attention.py and test_cache.py builds caches on the CPU itself, or is about the CPU.
"""

from test_attention import (                                          # noqa: F401
    test_a_changed_row_changes_no_other, test_cutting_leaves_the_same_memory_and_outputs, test_every_score_and_mixing,
    test_extreme_logits_while_folding, test_logits_that_are_all_huge,
    test_memories_partition_the_past_and_the_state_is_the_sum_of_the_rest,
    test_mixing_defaults_to_gated_if_there_is_a_gate, test_only_starts_or_only_stops,
    test_outputs_and_rankings_against_the_oracle, test_padded_and_packed_rows_equal_plain_ones,
    test_prefill_and_decoding_agree_at_length, test_real_sizes, test_repeating_a_call_gives_the_same_bits,
    test_row_ids_seed_the_random_score, test_rows_and_heads_are_independent, test_scale_defaults_to_the_root_of_D,
    test_scores_bits_do_not_depend_on_the_call, test_the_state_carries_the_answer_under_lolcats,
    test_ties_keep_the_earlier_position, test_with_everything_cached_it_is_causal_softmax,
    test_without_sparse_cache_it_is_window_softmax_and_linear_attention, test_zeros_everywhere)
from test_cache import (                                              # noqa: F401
    test_a_crop_changes_only_the_rows_that_are_longer, test_a_reset_cache_stays_bound_to_its_kind,
    test_an_empty_cache, test_continuing_from_a_copy, test_continuing_from_a_crop, test_continuing_from_a_saved_file,
    test_continuing_from_selected_and_repeated_rows, test_copies_are_as_large, test_crop_beyond_the_chunk_raises,
    test_heads_of_a_group_share_a_set, test_memory_accounts_for_every_byte, test_memory_does_not_grow,
    test_negative_rows_and_heads_count_from_the_end, test_pieces_of_one_token_and_a_copy_after_each,
    test_reset_rows_are_new, test_rows_and_heads_that_do_not_exist, test_rows_of_a_wrong_kind_raise_and_change_nothing,
    test_scores_are_nan_until_the_first_ranking, test_what_a_crop_removes_is_forgotten,
    test_wrong_rows_raise_and_change_nothing)
from test_threads import (                                            # noqa: F401
    test_threads_that_share_a_cache_lose_no_token, test_threads_with_caches_of_their_own)
