"""Score a distillation recipe's answers with its teacher: python -m mindpangu.annotate recipe=kd_student."""

from mindpangu.pipeline import annotate, entry_point

main = entry_point(annotate)

if __name__ == "__main__":
    main()
