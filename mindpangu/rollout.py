"""Sample the answers that a distillation recipe trains on: python -m mindpangu.rollout recipe=kd_student.

python -m mindpangu.rollout recipe=grpo samples and grades those of the starting model: pass_rates.jsonl of its run.
"""

from mindpangu.pipeline import entry_point, rollout

main = entry_point(rollout)

if __name__ == "__main__":
    main()
