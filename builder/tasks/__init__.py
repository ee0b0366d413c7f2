"""Records that pass between the steps of a build, such as the plan. They have no behaviour beyond their consistency."""
