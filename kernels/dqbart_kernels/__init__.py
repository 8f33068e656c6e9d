"""Low-bit products and what is fused with them, each beside a plain torch reference. Never imports dqbart."""
