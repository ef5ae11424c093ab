"""Speed and memory of the engines, measured in one run beside a hand-written loop and other simulators."""
