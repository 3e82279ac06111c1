"""The federation across machines, on Flower; nothing of Flower is imported unless asked."""
