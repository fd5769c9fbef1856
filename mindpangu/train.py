"""Train one recipe, and at the small scales everything it stands on: python -m mindpangu.train recipe=kd_student."""

from mindpangu.pipeline import entry_point, train

main = entry_point(train)

if __name__ == "__main__":
    main()
