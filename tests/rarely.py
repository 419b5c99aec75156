"""Which tests run in the exhaustive run alone (`launch/test.sh -m ''`), beside those that are marked where they stand.

They are combinations of what others cover one by one, and take long; by them the default run stays within its time.
"""

# Every so many-th of a test's cases runs by default, the first one among them.
EVERY = {
    'methods/test_also_train.py::test_what_trains_whole_goes_out_and_comes_back': 3,
    'methods/test_decoder_families.py::test_begins_at_the_model_and_merges_into_the_same_function': 3,
    'methods/test_lora.py::test_sum_first_is_the_same': 2,
    'methods/test_methods.py::test_begins_at_the_model_and_merges_into_the_same_function': 8,
    'methods/test_methods.py::test_trains_its_own_leaves_alike_on_any_mesh': 2,
    'methods/test_peft.py::test_lora_goes_there_and_back_and_trains_alike': 2,
    'methods/test_peft_experts.py::test_lora_made_here_loads_there_and_comes_back': 3,
    'methods/test_training.py::test_a_resumed_run_ends_the_same': 2,
    'models/test_encoders.py::test_initialisation_has_huggingface_statistics': 4,
    'models/test_families.py::test_cache_step_by_step_equals_the_whole': 2,
    'models/test_families.py::test_gradients_equal_transformers': 2,
    'models/test_families.py::test_initialisation_has_huggingface_statistics': 4,
    'models/test_families.py::test_remat_changes_no_gradient': 3,
    'models/test_moe.py::test_gradients_and_auxiliary_loss_equal_transformers': 2,
    'optim/test_rounding.py::test_bfloat16_learns_as_float32_does': 2,
    'properties/test_method_properties.py::test_a_method_begins_at_the_model': 2,
    'properties/test_method_properties.py::test_merged_weights_compute_the_same': 2,
    'properties/test_update_properties.py::test_an_update_is_traced_once': 2,
    'properties/test_update_properties.py::test_eight_devices_do_what_one_does': 2,
    'properties/test_update_properties.py::test_gradients_are_of_the_trainable_leaves_alone': 2,
    'properties/test_update_properties.py::test_four_micro_batches_are_one_batch': 2,
    'properties/test_update_properties.py::test_frozen_leaves_keep_their_bytes_and_the_others_stay_finite': 2,
    'trainer/test_meshes.py::test_any_mesh_gives_the_losses_of_one_device': 2,
    'trainer/test_meshes.py::test_micro_batches_give_the_losses_of_one_batch': 2,
    'trainer/test_pod.py::test_a_lost_process_ends_the_others_with_a_line_that_names_it': 2,
    'trainer/test_rl.py::test_a_mesh_learns_what_one_device_does': 3,
    'trainer/test_rl.py::test_added_methods_leave_the_base_alone': 3,
    'trainer/test_rl.py::test_micro_batches_and_packing_change_nothing': 2,
    'trainer/test_rl.py::test_the_policy_is_the_reference_at_first_and_one_run_is_like_another': 2,
    'trainer/test_rl.py::test_the_reward_rises': 2,
    'trainer/test_rl.py::test_the_samplers_log_probabilities_serve_as_well_as_scores': 2,
    'weights/test_low_precision.py::test_training_is_as_good_as_in_bfloat16': 2,
}

# None of their cases runs by default.
NEVER = {
    'methods/test_memory.py::test_eight_bit_state_follows_adamw_at_a_quarter_of_the_bytes',
    'methods/test_new_tokens.py::test_a_killed_run_ends_with_the_same_bytes',
    'models/test_custom_family.py::test_a_stopped_run_ends_with_the_same_weights',
    'trainer/test_mixtures.py::test_killed_it_ends_bit_for_bit_the_same',
    'trainer/test_mixtures.py::test_two_hosts_train_on_the_same_rows',
    'trainer/test_pod.py::test_two_processes_as_slices_give_the_losses_of_one_device',
    'trainer/test_rl_environments.py::test_a_killed_run_ends_as_if_nothing_had_been',
    'trainer/test_rl_environments.py::test_its_reward_rises',
    'trainer/test_rl_environments.py::test_two_hosts_exchange_as_one',
}
