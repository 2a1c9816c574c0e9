"""What each language's node types are: a table of names, one tier each. docs/languages.md shows how to add one.

    LANGUAGES["go"].control         # "for_statement return_statement ..."

The names are those of the official tree-sitter grammars; `syntax.grammar` checks each when it loads a table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Table:
    """How one language's node types map to tiers. Every name is checked against the grammar when it loads."""

    grammar: str  # module of the official tree-sitter wheel
    suffixes: str  # endings of its files; all lists are space-separated
    fences: str  # what a Markdown code fence calls it: the first is written, all are read
    skeleton: str  # node types: imports, definitions' headers, constants
    data: str  # assignments and declarations of variables, calls
    condition: str  # if / elif / else, conditional expressions, match, switch
    control: str  # for, while, return, and whatever else moves control
    headers: str  # skeleton nodes that own their bytes only up to their field `body`, or the one named as `node:field`
    comments: str  # node types whose bytes are of the default tier, punctuation included
    punctuation: bytes = b"()[]{},:;."  # skeleton wherever it stands outside comments
    walrus: bool = False  # whether `:=` is an operator, so that its colon is no punctuation
    function: str = "language"  # the wheel's function that gives the grammar


_PYTHON = Table(
    grammar="tree_sitter_python",
    suffixes=".py .pyi",
    fences="python py python3",
    skeleton="import_statement import_from_statement future_import_statement function_definition "
    "class_definition decorator integer float string concatenated_string true false none ellipsis",
    # `type(x).y = z` is a type alias to the grammar, too.
    data="assignment augmented_assignment named_expression type_alias_statement call",
    condition="if_statement elif_clause else_clause conditional_expression match_statement case_clause if_clause",
    # break, continue, yield, raise, try and with are not in the paper's list; they move control as return does.
    control="for_statement while_statement return_statement for_in_clause break_statement continue_statement "
    "yield raise_statement try_statement except_clause finally_clause with_statement",
    headers="function_definition class_definition",
    comments="comment",
    walrus=True,
)
_JAVASCRIPT = Table(
    grammar="tree_sitter_javascript",
    suffixes=".js .mjs .cjs .jsx",
    fences="javascript js jsx mjs node",
    # A function is an expression as often as a statement here, and as much a definition.
    skeleton="import_statement export_statement function_declaration generator_function_declaration "
    "function_expression generator_function arrow_function method_definition class_declaration class decorator "
    "number string template_string regex true false null undefined",
    data="lexical_declaration variable_declaration field_definition assignment_expression "
    "augmented_assignment_expression update_expression call_expression new_expression",
    condition="if_statement else_clause ternary_expression switch_statement switch_case switch_default",
    control="for_statement for_in_statement while_statement do_statement return_statement break_statement "
    "continue_statement throw_statement try_statement catch_clause finally_clause yield_expression "
    "labeled_statement with_statement",
    headers="export_statement:declaration function_declaration generator_function_declaration function_expression "
    "generator_function arrow_function method_definition class_declaration class",
    comments="comment html_comment hash_bang_line",
)
_C = Table(
    grammar="tree_sitter_c",
    suffixes=".c .h",
    fences="c",
    # A prototype is a `declaration` (data) of a `function_declarator` (skeleton). The lines of #if and #ifdef are
    # of no tier: their nodes hold all that they guard, often the whole file.
    skeleton="preproc_include preproc_def preproc_function_def preproc_call function_definition function_declarator "
    "struct_specifier union_specifier enum_specifier type_definition linkage_specification attribute_declaration "
    "attribute_specifier number_literal string_literal concatenated_string char_literal true false null",
    data="declaration field_declaration enumerator assignment_expression update_expression call_expression "
    "compound_literal_expression",
    condition="if_statement else_clause conditional_expression switch_statement case_statement",
    control="for_statement while_statement do_statement return_statement break_statement continue_statement "
    "goto_statement labeled_statement seh_try_statement seh_except_clause seh_finally_clause seh_leave_statement",
    headers="function_definition struct_specifier union_specifier enum_specifier linkage_specification",
    comments="comment",
)

LANGUAGES = {
    "python": _PYTHON,
    "javascript": _JAVASCRIPT,
    "typescript": replace(
        _JAVASCRIPT,
        grammar="tree_sitter_typescript",
        function="language_typescript",
        suffixes=".ts .mts .cts",
        fences="typescript ts",
        skeleton=_JAVASCRIPT.skeleton + " abstract_class_declaration interface_declaration enum_declaration "
        "type_alias_declaration ambient_declaration internal_module module import_alias function_signature "
        "method_signature abstract_method_signature call_signature construct_signature index_signature",
        data=_JAVASCRIPT.data.replace("field_definition", "public_field_definition") + " property_signature "
        "enum_assignment",
        condition=_JAVASCRIPT.condition + " conditional_type",
        headers=_JAVASCRIPT.headers + " abstract_class_declaration interface_declaration enum_declaration "
        "internal_module module",
        comments="comment html_comment hash_bang_line",
    ),
    "java": Table(
        grammar="tree_sitter_java",
        suffixes=".java",
        fences="java",
        skeleton="package_declaration import_declaration module_declaration class_declaration interface_declaration "
        "enum_declaration record_declaration annotation_type_declaration annotation_type_element_declaration "
        "method_declaration constructor_declaration compact_constructor_declaration lambda_expression annotation "
        "marker_annotation decimal_integer_literal hex_integer_literal octal_integer_literal binary_integer_literal "
        "decimal_floating_point_literal hex_floating_point_literal character_literal string_literal true false "
        "null_literal class_literal",
        data="local_variable_declaration field_declaration constant_declaration enum_constant assignment_expression "
        "update_expression method_invocation explicit_constructor_invocation object_creation_expression "
        "array_creation_expression resource",
        condition="if_statement ternary_expression switch_expression switch_block_statement_group switch_rule guard",
        control="for_statement enhanced_for_statement while_statement do_statement return_statement break_statement "
        "continue_statement throw_statement try_statement try_with_resources_statement catch_clause finally_clause "
        "yield_statement labeled_statement synchronized_statement",
        headers="module_declaration class_declaration interface_declaration enum_declaration record_declaration "
        "annotation_type_declaration method_declaration constructor_declaration compact_constructor_declaration "
        "lambda_expression",
        comments="line_comment block_comment",
    ),
    "c": _C,
    "cpp": replace(
        _C,
        grammar="tree_sitter_cpp",
        suffixes=".cpp .cc .cxx .hpp .hh .hxx",
        fences="cpp c++ cc cxx",
        skeleton=_C.skeleton + " class_specifier namespace_definition namespace_alias_definition using_declaration "
        "alias_declaration concept_definition friend_declaration access_specifier template_declaration "
        "template_parameter_list template_instantiation lambda_expression raw_string_literal user_defined_literal",
        data=_C.data + " field_initializer new_expression delete_expression",
        control=_C.control + " for_range_loop throw_statement try_statement catch_clause co_return_statement "
        "co_yield_statement",
        headers=_C.headers + " class_specifier namespace_definition template_declaration:parameters lambda_expression",
    ),
    "go": Table(
        grammar="tree_sitter_go",
        suffixes=".go",
        fences="go golang",
        skeleton="package_clause import_declaration function_declaration method_declaration func_literal "
        "type_declaration method_elem int_literal float_literal imaginary_literal rune_literal "
        "interpreted_string_literal raw_string_literal true false nil iota",
        data="var_declaration const_declaration short_var_declaration field_declaration assignment_statement "
        "inc_statement dec_statement send_statement receive_statement call_expression type_conversion_expression "
        "composite_literal",
        condition="if_statement expression_switch_statement type_switch_statement expression_case type_case "
        "default_case",
        control="for_statement return_statement break_statement continue_statement fallthrough_statement "
        "goto_statement labeled_statement go_statement defer_statement select_statement communication_case",
        headers="function_declaration method_declaration func_literal",
        comments="comment",
        walrus=True,
    ),
    "rust": Table(
        grammar="tree_sitter_rust",
        suffixes=".rs",
        fences="rust rs",
        skeleton="use_declaration extern_crate_declaration mod_item foreign_mod_item function_item "
        "function_signature_item struct_item enum_item union_item trait_item impl_item type_item associated_type "
        "macro_definition attribute_item inner_attribute_item closure_expression integer_literal float_literal "
        "negative_literal boolean_literal char_literal string_literal raw_string_literal",
        data="let_declaration const_item static_item field_declaration enum_variant assignment_expression "
        "compound_assignment_expr call_expression macro_invocation struct_expression",
        condition="if_expression else_clause match_expression match_arm let_condition let_chain",
        control="for_expression while_expression loop_expression return_expression break_expression "
        "continue_expression yield_expression try_expression",
        headers="mod_item foreign_mod_item function_item struct_item enum_item union_item trait_item impl_item "
        "closure_expression",
        comments="line_comment block_comment",
    ),
}
