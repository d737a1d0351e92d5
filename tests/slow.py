"""Tests that take more than about ten seconds of a core: `make slow-test` runs them, and CI.

Names are prefixes of pytest's node ids. Measured with `pytest -n 2 --durations=0`; whole trainings
and runs of several processes carry the mark in their files.
"""

SLOW = (
    "tests/benchmarks/test_benchmarks.py::test_decode_gpu_times_and_compares",
    "tests/benchmarks/test_benchmarks.py::test_peer_transformer_is_causal_and_decodes_from_its_cache",
    "tests/benchmarks/test_gpu_day.py::test_a_training_resumes_exactly",
    "tests/benchmarks/test_gpu_day.py::test_the_rehearsal_runs_every_stage",
    "tests/cli/test_page.py::test_a_drawing_is_completed",
    "tests/cli/test_page.py::test_uploads_are_completed_or_refused",
    "tests/cli/test_programs.py::test_completions_are_made_in_batches_with_progress",
    "tests/cli/test_programs.py::test_sampling_keeps_a_models_own_settings_where_none_are_given",
    "tests/data/test_data.py::test_workers_give_the_same_batches",
    "tests/data/test_token_cache.py::test_extract_codes_program",
    "tests/evaluation/test_evaluate.py::test_program_says_what_is_missing",
    "tests/evaluation/test_evaluate.py::test_report_and_pictures",
    "tests/models/test_models.py::test_grouped_adaln_rewritten_per_layer_is_the_same_model",
    "tests/models/test_models.py::test_ways_to_execute_give_the_same_values_and_gradients",
    "tests/ops/test_triton.py::test_kernels_compile_without_spills",
    "tests/ops/test_triton.py::test_kernels_draw_the_tokens_that_the_modules_draw",
    "tests/ops/test_triton.py::test_logits_and_states_of_the_kernels",
    "tests/parallel/test_distributed.py::test_a_signal_before_the_first_step_of_a_run_that_goes_on_is_heard",
    "tests/parallel/test_distributed.py::test_the_last_work_of_process_0_is_waited_for",
    "tests/parallel/test_sharding.py::test_a_step_does_not_depend_on_the_mesh",
    "tests/parallel/test_sharding.py::test_logits_of_a_sharded_vocabulary_are_never_gathered",
    "tests/perf/test_footprint.py::test_report_of_a_step_and_of_generation",
    "tests/sampling/test_decode.py::test_an_image_does_not_depend_on_its_batch_or_devices",
    "tests/sampling/test_decode.py::test_every_engine",
    "tests/sampling/test_decode.py::test_the_compiled_loop_copies_no_cache",
    "tests/sampling/test_export.py::test_sampler_draws_the_same_images_without_the_library",
    "tests/sampling/test_export.py::test_sampler_takes_names_and_all_settings_and_keeps_the_models_own",
    "tests/test_jax_configuration.py::",
    "tests/training/test_aim.py::test_pictures_are_encoded_on_the_way_to_the_same_codes",
    "tests/training/test_loop.py::test_the_example_sends_scalars_to_weights_and_biases",
    "tests/training/test_rate.py::test_rate_of_a_tiny_aim_is_measured",
    "tests/training/test_tokenizer.py::test_a_run_tells_all_parts_of_its_loss",
    "tests/training/test_tokenizer.py::test_dead_codes_begin_anew_from_what_pictures_are_encoded_to",
    "tests/training/test_tokenizer.py::test_decoder_alone",
    "tests/training/test_traces.py::test_a_train_step_is_traced_once",
    "tests/weights/test_inception.py::test_sets_of_images_and_their_cache",
)
