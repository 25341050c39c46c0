"""A recorded run of the policy, computed again and compared, bit for bit."""
