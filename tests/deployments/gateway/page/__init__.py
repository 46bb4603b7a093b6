"""The page in a real Chromium, on a gateway whose model says what the test wants."""
