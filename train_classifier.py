#!/usr/bin/env python
"""Train the small classifier whose features score Fashion-MNIST samples, and measure its accuracy on the test images."""

from exits import exit_cleanly, guarded_imports

with guarded_imports():
    from command_line import parse_options
    from datasets_prep.datasets import DatasetOptions, open_dataset
    from datasets_prep.folder_layout.report import show_data
    from evaluation.features.classifier import load_classifier, save_classifier
    from options import as_json
    from runtime.messages import show
    from runtime.outputs import check_file
    from runtime.precision import PrecisionOptions, choose_machine
    from training.classifier import ClassifierTrainingOptions, accuracy, gather_images, train_classifier


def main() -> None:
    """Parse the flags, train on the training images, and save the classifier with its accuracy on the test images."""
    options = parse_options(str(__doc__), [ClassifierTrainingOptions, DatasetOptions, PrecisionOptions])
    settings = options[ClassifierTrainingOptions]
    check_file(settings.output, "--output")
    machine = choose_machine(options[PrecisionOptions])
    train, test = (open_dataset(options[DatasetOptions], split) for split in ("train", "validation"))
    show_data(train, test)
    network = train_classifier(gather_images(train), train.labels, train.facts.class_names, settings, machine)
    kept = {name: value for name, value in as_json(settings).items() if name != "output"}
    facts = {"dataset": train.facts.name, "fingerprint": train.fingerprint, "training": kept}
    facts["test_accuracy"] = accuracy(network, gather_images(test), test.labels, machine)
    save_classifier(network, settings.output, facts)
    measured = accuracy(load_classifier(settings.output).to(machine.device), gather_images(test), test.labels, machine)
    show(f"saved to {settings.output}; accuracy on {len(test)} test images: {100 * measured:.2f} %")


if __name__ == "__main__":
    exit_cleanly(main)
